"""Linear combinations: one read of every term and one write of the sum."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_mdgd.kernels.compiled import chunks, kernels
from torch_mdgd.kernels.eager import TINY
from torch_mdgd.kernels.types import Tensors


def combine_(
    out: Tensors, vectors: Sequence[Tensors], coefficients: Tensor, masks: Sequence[Tensor | None] | None = None
) -> None:
    """See :func:`torch_mdgd.kernels.combine_`. A coefficient that float32 cannot hold well makes the sum float64."""
    # Held until the end, since kernels know addresses only.
    lists = [chunks.contiguous(x) for x in (out, masks or [None] * len(out), *vectors)]
    at, kinds = chunks.addresses(lists)
    numels = chunks.lengths(out)
    factors = coefficients.numpy().astype(np.float64)
    size = np.abs(factors)
    wide = ((size > 1 / TINY) | ((size < TINY) & (size > 0))).any(1) | (kinds[:, 0] == kernels.FLOAT64)
    for dtype, chosen in ((np.float32, ~wide), (np.float64, wide)):
        if chosen.any():
            weights = np.where(chosen[:, None], factors, 0).astype(dtype)
            _run(chunks.cut(numels, chosen), at, kinds, weights)
    torch.autograd.graph.increment_version([x for x in out if x is not None])
    for x, target in zip(out, lists[0], strict=True):
        if x is not None and target is not None and x is not target:
            x.copy_(target)


def _run(parts: chunks.Array, at: chunks.Array, kinds: chunks.Array, weights: chunks.Array) -> None:
    def run(first: int, end: int) -> None:
        kernels.combine(first, end, parts, at, kinds, weights, chunks.scratch(2, weights.dtype.type))

    chunks.spread(run, len(parts))

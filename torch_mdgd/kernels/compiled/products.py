"""Inner products: all of a chunk's in one read, then a sum over each parameter's chunks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_mdgd.kernels.compiled import chunks, kernels
from torch_mdgd.kernels.types import Tensors


def inner_products(rows: Sequence[Tensors], columns: Sequence[Tensors]) -> Tensor:
    """See :func:`torch_mdgd.kernels.inner_products`. In float64 throughout."""
    vectors, place = _distinct([*rows, *columns])
    lists = [chunks.contiguous(vector) for vector in vectors]
    numels = chunks.lengths(*lists)
    at, kinds = chunks.addresses(lists)
    wide = (kinds == kernels.FLOAT64).any(1)
    table = np.zeros((len(numels), len(lists), len(lists)))
    for dtype, chosen in ((np.float32, ~wide), (np.float64, wide)):
        parts = chunks.cut(numels, chosen)
        if len(parts):
            t, begins = np.unique(parts[:, 0], return_index=True)
            table[t] = np.add.reduceat(_tables(parts, at, kinds, dtype), begins, axis=0)
    return torch.from_numpy(table[:, place[: len(rows)]][:, :, place[len(rows) :]])


def _tables(parts: chunks.Array, at: chunks.Array, kinds: chunks.Array, dtype: type) -> chunks.Array:
    """Those of each chunk, shape (N, V, V)."""
    vectors = at.shape[1]
    out = np.empty((len(parts), vectors, vectors))

    def run(first: int, end: int) -> None:
        kernels.products(first, end, parts, at, kinds, chunks.scratch(vectors, dtype), out)

    chunks.spread(run, len(parts))
    return out


def _distinct(vectors: Sequence[Tensors]) -> tuple[list[Tensors], list[int]]:
    """The vectors without repetition, and each one's place among them."""
    of = {id(vector): tuple(map(id, vector)) for vector in vectors}
    keys = [of[id(vector)] for vector in vectors]
    found = dict(zip(keys, vectors, strict=True))
    order = list(found)
    return list(found.values()), [order.index(key) for key in keys]

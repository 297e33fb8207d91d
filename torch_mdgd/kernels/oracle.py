"""The kernels in float64 over whole tensors: slow, and short enough to be seen to be right.

Every other backend is tested against this one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_mdgd.kernels.types import Tensors


def inner_products(rows: Sequence[Tensors], columns: Sequence[Tensors]) -> Tensor:
    """See :func:`torch_mdgd.kernels.inner_products`."""
    table = torch.zeros(len(rows[0]), len(rows), len(columns), dtype=torch.float64, device="cpu")
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            for t, (x, y) in enumerate(zip(row, column, strict=True)):
                if x is not None and y is not None:
                    table[t, r, c] = (x.double() * y.double()).sum()
    return table


def combine_(
    out: Tensors, vectors: Sequence[Tensors], coefficients: Tensor, masks: Sequence[Tensor | None] | None = None
) -> None:
    """See :func:`torch_mdgd.kernels.combine_`."""
    for t, target in enumerate(out):
        if target is None:
            continue
        total = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
        for r, vector in enumerate(vectors):
            x = vector[t]
            if x is not None:
                total = total + coefficients[t, r].to(target.device) * x.double()
        mask = masks[t] if masks is not None else None
        if mask is not None:
            total = total * mask
        target.copy_(total)


def top_k_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """See :func:`torch_mdgd.kernels.top_k_masks`."""
    for t, s in enumerate(scores):
        if s.isnan().any():
            raise ValueError(f"scores[{t}] has a NaN")
    flat = torch.cat([s.reshape(-1).double() for s in scores])
    if not 1 <= k <= len(flat):
        raise ValueError(f"k must be within 1 and the {len(flat)} scores, not {k}")
    order = torch.argsort(flat, descending=True, stable=True)
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[order[:k]] = True
    parts = chosen.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


def top_k_similarity_masks(g: Tensors, v: Tensors, g0: Tensors, a: Tensor | None, k: int) -> list[Tensor | None]:
    """See :func:`torch_mdgd.kernels.top_k_similarity_masks`."""
    scores: list[Tensor | None] = []
    for t, tensors in enumerate(zip(g, v, g0, strict=True)):
        some = next((x for x in tensors if x is not None), None)
        if some is None:
            scores.append(None)
            continue
        task, visual, reference = (torch.zeros_like(some).double() if x is None else x.double() for x in tensors)
        scores.append((task if a is None else task - a[t].item() * visual) * reference)
    masks = iter(top_k_masks([s for s in scores if s is not None], k))
    return [None if s is None else next(masks) for s in scores]

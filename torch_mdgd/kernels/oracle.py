"""The kernels in float64 over whole tensors: slow, and short enough to be seen to be right.

Every other backend is tested against this one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_mdgd.kernels.types import Role


def inner_products(rows: Sequence[Role], columns: Sequence[Role]) -> Tensor:
    """See :func:`torch_mdgd.kernels.inner_products`."""
    table = torch.zeros(len(rows[0]), len(rows), len(columns), dtype=torch.float64)
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            for t, (x, y) in enumerate(zip(row, column, strict=True)):
                if x is not None and y is not None:
                    table[t, r, c] = (x.double() * y.double()).sum()
    return table


def combine_(
    out: Role, roles: Sequence[Role], coefficients: Tensor, masks: Sequence[Tensor | None] | None = None
) -> None:
    """See :func:`torch_mdgd.kernels.combine_`."""
    for t, target in enumerate(out):
        if target is None:
            continue
        total = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
        for r, role in enumerate(roles):
            x = role[t]
            if x is not None:
                total = total + coefficients[t, r].to(target.device) * x.double()
        mask = masks[t] if masks is not None else None
        if mask is not None:
            total = total * mask
        target.copy_(total)


def top_k_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """See :func:`torch_mdgd.kernels.top_k_masks`."""
    flat = torch.cat([s.reshape(-1).double() for s in scores])
    order = torch.argsort(flat, descending=True, stable=True)
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[order[:k]] = True
    parts = chosen.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]

"""The kernels in plain torch, for any device: blocked, so that temporaries stay in cache, and in place."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torch_mdgd.kernels.types import Role

BLOCK = 1 << 14


def _blocks(numel: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, numel)) for start in range(0, numel, BLOCK))


def inner_products(rows: Sequence[Role], columns: Sequence[Role]) -> Tensor:
    """See :func:`torch_mdgd.kernels.inner_products`."""
    roles = list({id(role): role for role in (*rows, *columns)}.values())
    where = {id(role): r for r, role in enumerate(roles)}
    grams = [_gram([role[t] for role in roles]) for t in range(len(roles[0]))]
    device = next((gram.device for gram in grams if gram is not None), torch.device("cpu"))
    zero = torch.zeros(len(roles), len(roles), dtype=torch.float64, device=device)
    table = torch.stack([zero if gram is None else gram.to(device) for gram in grams])
    return table[:, [where[id(r)] for r in rows]][:, :, [where[id(c)] for c in columns]]


def _gram(vectors: list[Tensor | None]) -> Tensor | None:
    """All inner products of one parameter's vectors, shape (R, R); None if there is no vector at all."""
    flat = {r: x.reshape(-1) for r, x in enumerate(vectors) if x is not None}
    if not flat:
        return None
    first = next(iter(flat.values()))
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=first.device)
    buffer = torch.zeros(len(vectors), BLOCK, dtype=torch.float64, device=first.device)
    for block in _blocks(first.numel()):
        part = buffer[:, : block.stop - block.start]
        for r, x in flat.items():
            part[r].copy_(x[block])
        gram.addmm_(part, part.T)
    return gram


def combine_(
    out: Role, roles: Sequence[Role], coefficients: Tensor, masks: Sequence[Tensor | None] | None = None
) -> None:
    """See :func:`torch_mdgd.kernels.combine_`."""
    for t, target in enumerate(out):
        if target is None:
            continue
        terms = [(r, x.reshape(-1)) for r, role in enumerate(roles) if (x := role[t]) is not None]
        dtype = torch.promote_types(target.dtype, torch.float32)
        scalars = coefficients[t].to(device=target.device, dtype=dtype)
        mask = masks[t].reshape(-1) if masks is not None and masks[t] is not None else None
        flat = target.view(-1) if target.is_contiguous() else target.new_empty(target.numel())
        for block in _blocks(target.numel()):
            total = torch.zeros(block.stop - block.start, dtype=dtype, device=target.device)
            for r, x in terms:
                total.addcmul_(x[block].to(dtype), scalars[r])
            if mask is not None:
                total.mul_(mask[block])
            flat[block] = total
        if not target.is_contiguous():
            target.copy_(flat.view(target.shape))


def top_k_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """See :func:`torch_mdgd.kernels.top_k_masks`."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    threshold = torch.kthvalue(flat, flat.numel() - k + 1).values
    chosen = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    chosen[ties[: k - int(chosen.sum())]] = True
    parts = chosen.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]

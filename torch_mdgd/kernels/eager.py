"""The kernels in plain torch, for any device: in blocks, so that temporaries stay in cache, and in place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_mdgd.kernels.selection import top_k_masks, top_k_similarity_masks
from torch_mdgd.kernels.types import Tensors

__all__ = ["combine_", "inner_products", "top_k_masks", "top_k_similarity_masks"]

# A megabyte of float32: longer to read than to call for, and still in a cache when it is read again.
BLOCK = 1 << 18
# Up to this many numbers a float64 matrix product is faster than pairs of float32 vectors.
SMALL = 1 << 14
# Nearer to zero, a block's float32 sum may have lost products to underflow, and a float32 coefficient its digits.
TINY = 2.0**-80


def inner_products(rows: Sequence[Tensors], columns: Sequence[Tensors]) -> Tensor:
    """See :func:`torch_mdgd.kernels.inner_products`.

    On the CPU, products are rounded to float32 and summed pairwise within a block (as torch sums), and blocks are
    summed in float64. Blocks that over- or underflow are done again in float64. Short vectors, float64 vectors
    and other devices, where looking at a sum would wait for it, are done in float64 throughout.
    """
    device = next((x.device for vector in (*rows, *columns) for x in vector if x is not None), torch.device("cpu"))
    table = torch.zeros(len(rows[0]), len(rows), len(columns), dtype=torch.float64, device=device)
    # Made once, for the pages of a large buffer cost more to get than the products that go into it.
    scratch = torch.empty(len(rows) + len(columns) + 1, BLOCK, dtype=torch.float32, device="cpu")
    for ts, rs, cs in _alike(rows, columns):
        left = [x.reshape(-1) for t in ts for r in rs if (x := rows[r][t]) is not None]
        right = [x.reshape(-1) for t in ts for c in cs if (x := columns[c][t]) is not None]
        products = _exact_products(left, right, len(ts)) if len(ts) > 1 else _products(left, right, scratch)
        places = [torch.tensor(x, dtype=torch.int64, device="cpu") for x in (ts, rs, cs)]
        table[places[0][:, None, None], places[1][:, None], places[2]] = products.to(device)
    return table


def _alike(rows: Sequence[Tensors], columns: Sequence[Tensors]) -> list[tuple[list[int], list[int], list[int]]]:
    """Parameters that can share their calls, with the rows and columns that they have: (parameters, rows, columns).

    Those of one small size on one device share; every other parameter is alone, and an empty one nowhere.
    """
    groups: dict[tuple[Any, ...], tuple[list[int], list[int], list[int]]] = {}
    for t in range(len(rows[0])):
        rs = [r for r, vector in enumerate(rows) if vector[t] is not None]
        cs = [c for c, vector in enumerate(columns) if vector[t] is not None]
        x = next((x for vector in rows if (x := vector[t]) is not None), None)
        if x is not None and x.numel() and cs:
            n = x.numel()
            key = (n, x.device, -1, *rs, -1, *cs) if n <= SMALL else (n, t)
            groups.setdefault(key, ([], rs, cs))[0].append(t)
    most = {key: max(1, 2 * SMALL // key[0]) for key in groups}
    return [
        (ts[i : i + most[key]], rs, cs) for key, (ts, rs, cs) in groups.items() for i in range(0, len(ts), most[key])
    ]


def _products(left: list[Tensor], right: list[Tensor], scratch: Tensor) -> Tensor:
    """The inner products of one parameter's flat vectors, shape (1, R, C), float64."""
    x = left[0]
    if x.device.type != "cpu" or x.numel() <= SMALL or any(y.dtype == torch.float64 for y in (*left, *right)):
        blocks = zip(_split(left), _split(right), strict=True)
        nothing = torch.zeros((), dtype=torch.float64, device="cpu")
        return sum((_exact_products(xs, ys, 1) for xs, ys in blocks), start=nothing)
    sums = _fast_products(left, right, scratch)
    suspicious = ~((sums.abs() > TINY) & sums.isfinite())
    if suspicious.any():
        for b, (xs, ys) in enumerate(zip(_split(left), _split(right), strict=True)):
            if not suspicious[b].any():
                continue
            # Nothing underflows where a vector is zero, as all visual gradients are at the first step.
            zeros = [[_is_zero(x) or _is_zero(y) for y in ys] for x in xs]
            zero = torch.tensor(zeros, dtype=torch.bool, device="cpu") & (sums[b] == 0)
            if (suspicious[b] & ~zero).any():
                sums[b] = _exact_products(xs, ys, 1)[0]
    return sums.sum(0, keepdim=True)


def _is_zero(x: Tensor) -> bool:
    return bool(x.amax() == 0) and bool(x.amin() == 0)


def _split(vectors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The vectors block by block."""
    if vectors[0].numel() <= BLOCK:
        return [tuple(vectors)]
    return list(zip(*(x.split(BLOCK) for x in vectors), strict=True))


def _exact_products(left: Sequence[Tensor], right: Sequence[Tensor], parameters: int) -> Tensor:
    """The inner products of R · T rows and C · T columns of one length, parameter by parameter, shape (T, R, C)."""
    X = torch.stack(tuple(left)).double().view(parameters, -1, len(left[0]))
    Y = torch.stack(tuple(right)).double().view(parameters, -1, len(left[0]))
    return X @ Y.mT


def _fast_products(left: list[Tensor], right: list[Tensor], scratch: Tensor) -> Tensor:
    """The inner products of every block, summed in float32, shape (blocks, R, C), float64."""
    where = [(x.data_ptr(), x.stride()) for x in (*left, *right)]
    vectors = dict(zip(where, (*left, *right), strict=True))
    place = [list(vectors).index(w) for w in where]
    # ⟨x, y⟩ = ⟨y, x⟩: each unordered pair of vectors is multiplied once.
    cells = [(min(i, j), max(i, j)) for i in place[: len(left)] for j in place[len(left) :]]
    pairs = list(dict.fromkeys(cells))
    sums = []
    for block in _split(list(vectors.values())):
        product, *casts = scratch[:, : len(block[0])].unbind()
        xs = [x if x.dtype == torch.float32 else c.copy_(x) for x, c in zip(block, casts, strict=False)]
        # torch.dot would be half as fast again, but its running sums are off by 2e-5 where all numbers are alike.
        sums.append(torch.stack([torch.mul(xs[i], xs[j], out=product).sum() for i, j in pairs]))
    table = torch.stack(sums).double()[:, [pairs.index(cell) for cell in cells]]
    return table.view(-1, len(left), len(right))


def combine_(
    out: Tensors, vectors: Sequence[Tensors], coefficients: Tensor, masks: Sequence[Tensor | None] | None = None
) -> None:
    """See :func:`torch_mdgd.kernels.combine_`. A coefficient that float32 cannot hold well makes the sum float64."""
    size = coefficients.abs()
    wide = ((size > 1 / TINY) | ((size < TINY) & (size > 0))).any(1)
    # Where looking at the coefficients would wait for them, every sum is float64.
    exact = wide.tolist() if wide.device.type == "cpu" else [True] * len(wide)
    single, double = coefficients.float(), coefficients.double()
    buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    for t, target in enumerate(out):
        if target is None:
            continue
        row = (double if exact[t] or target.dtype == torch.float64 else single)[t]
        # As Python numbers where that waits for nothing: torch then adds a multiple twice as fast.
        scalars = row.tolist() if target.device.type == "cpu" else row.to(target.device).unbind()
        terms = [(x.reshape(-1), c) for vector, c in zip(vectors, scalars, strict=True) if (x := vector[t]) is not None]
        mask = masks[t] if masks is not None else None
        flat = target.view(-1) if target.is_contiguous() else target.new_empty(target.numel())
        if (row.dtype, flat.device) not in buffers:
            buffers[row.dtype, flat.device] = torch.empty(2, BLOCK, dtype=row.dtype, device=flat.device)
        _combine_flat(flat, [x for x, _ in terms], [c for _, c in terms], mask, buffers[row.dtype, flat.device])
        if not target.is_contiguous():
            target.copy_(flat.view(target.shape))


def _combine_flat(
    flat: Tensor, terms: list[Tensor], scalars: Sequence[Any], mask: Tensor | None, scratch: Tensor
) -> None:
    if not terms:
        flat.zero_()
        return
    if mask is None and all(x.dtype == scratch.dtype for x in (flat, *terms)) and _is_first(flat, terms):
        for target, *block in _split([flat, *terms[1:]]):
            if isinstance(scalars[0], Tensor) or scalars[0] != 1:
                target.mul_(scalars[0])
            for x, scalar in zip(block, scalars[1:], strict=True):
                _add_multiple(target, x, scalar)
        return
    # Read as int8, a bool mask turns into numbers nine times faster.
    keep = [] if mask is None else [mask.reshape(-1).view(torch.int8)]
    for target, *block in _split([flat, *keep, *terms]):
        total, cast = scratch[:, : len(target)].unbind()
        for r, (x, scalar) in enumerate(zip(block[len(keep) :], scalars, strict=True)):
            part = x if x.dtype == total.dtype else cast.copy_(x)
            if r:
                _add_multiple(total, part, scalar)
            else:
                torch.mul(part, scalar, out=total)
        if keep:
            total.mul_(cast.copy_(block[0]))
        target.copy_(total)


def _is_first(flat: Tensor, terms: list[Tensor]) -> bool:
    """Whether the first term is the target itself and no other term is, so that the sum can grow in place."""
    shared = [x.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for x in terms]
    first = (terms[0].data_ptr(), terms[0].stride()) == (flat.data_ptr(), flat.stride())
    return first and not any(shared[1:])


def _add_multiple(total: Tensor, x: Tensor, scalar: float | Tensor) -> None:
    if isinstance(scalar, Tensor):
        total.addcmul_(x, scalar)
    else:
        total.add_(x, alpha=scalar)

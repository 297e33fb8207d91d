"""Inner products: each program those of one tile, then one program per parameter and pair sums the tiles'."""

# Kernels are typed by Triton, not by Python.
# mypy: disable-error-code="assignment, no-any-return, no-untyped-call, no-untyped-def, untyped-decorator"

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_mdgd.kernels.triton import chunks
from torch_mdgd.kernels.triton.chunks import load
from torch_mdgd.kernels.types import Tensors

# Nearer to zero, a tile's float32 sum may have lost products to underflow.
TINY = tl.constexpr(2.0**-80)
# So many columns fit in registers beside as many rows; further columns are another launch.
COLUMNS = 8
SUM_BLOCK = 1024


def inner_products(rows: Sequence[Tensors], columns: Sequence[Tensors]) -> Tensor:
    """See :func:`torch_mdgd.kernels.inner_products`."""
    count = len(rows[0])
    device = next((x.device for vector in (*rows, *columns) for x in vector if x is not None), torch.device("cpu"))
    if not count or not columns:
        return torch.zeros(count, len(rows), len(columns), dtype=torch.float64, device=device)
    if columns is rows and len(rows) <= COLUMNS:
        everything = [x for vector in rows for x in vector]
        return _products(everything, [], count, device)

    def table(r: int, c: int) -> Tensor:
        left, right = (
            [x for vector in side for x in vector] for side in (rows[r : r + COLUMNS], columns[c : c + COLUMNS])
        )
        return _products(left, right, count, device)

    across = range(0, len(columns), COLUMNS)
    return torch.cat([torch.cat([table(r, c) for c in across], dim=2) for r in range(0, len(rows), COLUMNS)], dim=1)


@torch.library.custom_op("torch_mdgd::inner_products", mutates_args=())
def _products(
    left: Sequence[Tensor | None], right: Sequence[Tensor | None], parameters: int, device: torch.device
) -> Tensor:
    """The table of R rows (of T tensors each, one row after the other) and C columns, shape (T, R, C), float64.

    Without columns, of the rows with themselves.
    """
    symmetric = not right
    R, C = len(left) // parameters, len(right or left) // parameters
    flat = [None if x is None else x.contiguous().view(-1) for x in (*left, *right)]
    parts = [flat[t::parameters] for t in range(parameters)]
    numels = [next((len(x) for x in tensors if x is not None), 0) for tensors in parts]
    ends = list(accumulate(chunks.tile_counts(numels), initial=0))
    partial = torch.zeros(ends[-1], R * C, dtype=torch.float64, device=device)
    out = torch.empty(parameters, R, C, dtype=torch.float64, device=device)
    (bounds,) = chunks.upload([torch.tensor(ends, dtype=torch.int64, device="cpu")], device)
    with chunks.on_device(device):
        for group in chunks.groups(parts, numels, device):
            _products_kernel[(len(group.tiles),)](
                group.addresses, group.numels, group.tiles, partial,
                group.pattern[:R], group.pattern[:C] if symmetric else group.pattern[R:],
                group.codes, symmetric, group.aligned, chunks.TILE, **chunks.OPTIONS,
            )  # fmt: skip
        _sum_kernel[(parameters, R * C)](partial, bounds, out, R * C, SUM_BLOCK, **chunks.OPTIONS)
    return out


@_products.register_fake
def _(left: Sequence[Tensor | None], right: Sequence[Tensor | None], parameters: int, device: torch.device) -> Tensor:
    R, C = len(left) // parameters, len(right or left) // parameters
    return torch.empty(parameters, R, C, dtype=torch.float64, device=device)


@triton.jit
def _products_kernel(
    addresses, numels, tiles, partial,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CODES: tl.constexpr, SYMMETRIC: tl.constexpr,
    ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(tiles + program * 3)
    start = tl.multiple_of(tl.load(tiles + program * 3 + 1), TILE)
    partial += tl.load(tiles + program * 3 + 2) * len(LEFT) * len(RIGHT)
    addresses += row * len(CODES)
    numel = tl.load(numels + row)
    if start + TILE <= numel:
        _tile(addresses, start, numel, partial, LEFT, RIGHT, CODES, SYMMETRIC, ALIGNED, TILE, True)
    else:
        _tile(addresses, start, numel, partial, LEFT, RIGHT, CODES, SYMMETRIC, ALIGNED, TILE, False)


@triton.jit
def _tile(
    addresses, start, numel, partial,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CODES: tl.constexpr, SYMMETRIC: tl.constexpr,
    ALIGNED: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offsets = start + tl.arange(0, TILE)
    vectors = ()
    for i in tl.static_range(len(CODES)):
        vectors += (load(tl.load(addresses + i), offsets, numel, CODES[i], ALIGNED, FULL),)
    for r in tl.static_range(len(LEFT)):
        for c in tl.static_range(len(RIGHT)):
            if LEFT[r] >= 0 and RIGHT[c] >= 0 and (c >= r or not SYMMETRIC):
                product = _product(vectors[LEFT[r]], vectors[RIGHT[c]])
                tl.store(partial + r * len(RIGHT) + c, product)
                if SYMMETRIC and c > r:
                    tl.store(partial + c * len(RIGHT) + r, product)


@triton.jit
def _product(x, y):
    """In float32 by a tree of sums, where that holds the result, else in float64."""
    product = tl.sum(x * y, 0).to(tl.float64)
    if (x * y).dtype == tl.float32:
        size = tl.abs(product)
        if not ((size > TINY) & (size < float("inf"))):
            product = tl.sum(x.to(tl.float64) * y.to(tl.float64), 0)
    return product


@triton.jit
def _sum_kernel(partial, bounds, out, CELLS: tl.constexpr, BLOCK: tl.constexpr):
    parameter = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1)
    first, end = tl.load(bounds + parameter), tl.load(bounds + parameter + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(first, end, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        total += tl.load(partial + tiles * CELLS + cell, mask=tiles < end, other=0)
    tl.store(out + parameter * CELLS + cell, tl.sum(total, 0))

"""The linear combination: each program writes one tile of one parameter."""

# Kernels are typed by Triton, not by Python.
# mypy: disable-error-code="assignment, no-untyped-call, no-untyped-def, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_mdgd.kernels.triton import chunks
from torch_mdgd.kernels.triton.chunks import load, pointer
from torch_mdgd.kernels.types import Tensors

# Outside of these, float32 may not hold a coefficient's digits.
TINY = tl.constexpr(2.0**-80)
HUGE = tl.constexpr(2.0**80)


def combine_(
    out: Tensors, vectors: Sequence[Tensors], coefficients: Tensor, masks: Sequence[Tensor | None] | None = None
) -> None:
    """See :func:`torch_mdgd.kernels.combine_`."""
    places = [t for t, target in enumerate(out) if target is not None]
    targets = [target for target in out if target is not None]
    if targets:
        terms = [vector[t] for vector in vectors for t in places]
        table = coefficients.to(targets[0].device, torch.float64)
        _combine(targets, terms, table, places, [None if masks is None else masks[t] for t in places])


@torch.library.custom_op("torch_mdgd::combine", mutates_args=("out",))
def _combine(
    out: Sequence[Tensor],
    terms: Sequence[Tensor | None],
    coefficients: Tensor,
    places: Sequence[int],
    masks: Sequence[Tensor | None],
) -> None:
    """The combination of R vectors (of len(out) tensors each, one vector after the other) over ``out``.

    Row ``places[t]`` of the coefficients belongs to ``out[t]``.
    """
    device = out[0].device
    flat = [x.view(-1) if x.is_contiguous() else x.new_empty(x.numel()) for x in out]
    others = [None if x is None else x.contiguous().view(-1) for x in (*masks, *terms)]
    parts = [[x, *others[t :: len(out)]] for t, x in enumerate(flat)]
    # A kernel that reads every coefficient in order needs no table of places.
    rows = coefficients.contiguous() if list(places) == list(range(len(coefficients))) else coefficients[list(places)]
    with chunks.on_device(device):
        for group in chunks.groups(parts, [len(x) for x in flat], device):
            _combine_kernel[(len(group.tiles),)](
                group.addresses, group.numels, group.places, group.tiles, rows,
                group.pattern[0], group.pattern[1], group.pattern[2:], group.codes, group.aligned, chunks.TILE,
                **chunks.OPTIONS,
            )  # fmt: skip
    for x, written in zip(out, flat, strict=True):
        if not x.is_contiguous():
            x.copy_(written.view(x.shape))


@triton.jit
def _combine_kernel(
    addresses, numels, places, tiles, coefficients,
    OUT: tl.constexpr, MASK: tl.constexpr, TERMS: tl.constexpr, CODES: tl.constexpr,
    ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(tiles + program * 3)
    start = tl.multiple_of(tl.load(tiles + program * 3 + 1), TILE)
    addresses += row * len(CODES)
    coefficients += tl.load(places + row) * len(TERMS)
    numel = tl.load(numels + row)
    if start + TILE <= numel:
        _tile(addresses, coefficients, start, numel, OUT, MASK, TERMS, CODES, ALIGNED, TILE, True)
    else:
        _tile(addresses, coefficients, start, numel, OUT, MASK, TERMS, CODES, ALIGNED, TILE, False)


@triton.jit
def _tile(
    addresses, coefficients, start, numel,
    OUT: tl.constexpr, MASK: tl.constexpr, TERMS: tl.constexpr, CODES: tl.constexpr,
    ALIGNED: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offsets = start + tl.arange(0, TILE)
    vectors = ()
    # If the target is not also a term, nothing uses its load and the compiler drops it.
    for i in tl.static_range(len(CODES)):
        vectors += (load(tl.load(addresses + i), offsets, numel, CODES[i], ALIGNED, FULL),)
    if CODES[OUT] == 3:
        total = _sum(vectors, coefficients, MASK, TERMS, TILE, tl.float64)
    else:
        wide = False
        for r in tl.static_range(len(TERMS)):
            size = tl.abs(tl.load(coefficients + r))
            wide = wide | (size > HUGE) | ((size < TINY) & (size > 0))
        if wide:
            total = _sum(vectors, coefficients, MASK, TERMS, TILE, tl.float64).to(tl.float32)
        else:
            total = _sum(vectors, coefficients, MASK, TERMS, TILE, tl.float32)
    out = pointer(tl.load(addresses + OUT), CODES[OUT], ALIGNED) + offsets
    if FULL:
        tl.store(out, total.to(out.dtype.element_ty))
    else:
        tl.store(out, total.to(out.dtype.element_ty), mask=offsets < numel)


@triton.jit
def _sum(
    vectors, coefficients, MASK: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    total = tl.zeros((TILE,), dtype=DTYPE)
    for r in tl.static_range(len(TERMS)):
        if TERMS[r] >= 0:
            total += tl.load(coefficients + r).to(DTYPE) * vectors[TERMS[r]].to(DTYPE)
    if MASK >= 0:
        total *= vectors[MASK].to(DTYPE)
    return total

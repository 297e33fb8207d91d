"""Exact top-k over a list of tensors: radix selection on integer keys, digit by digit from the most significant.

A float's bits, with the negative ones turned over, order as the float does. One pass counts the numbers by their
first eleven bits, which says which eleven bits the k-th largest has; the next pass counts those that share them by
the next eleven bits; and so on. Counts are integers, so that the order of atomic additions makes no difference.
The number that is left is the threshold, and how many of its ties are wanted is known; a prefix sum over the tiles'
ties finds the first of them. The device is waited for once, to refuse NaN.
"""

# Kernels are typed by Triton, not by Python.
# mypy: disable-error-code="assignment, misc, no-untyped-call, no-untyped-def, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_mdgd.kernels.triton import chunks
from torch_mdgd.kernels.triton.chunks import load, pointer
from torch_mdgd.kernels.types import Tensors

DIGIT = 11


def top_k_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """See :func:`torch_mdgd.kernels.top_k_masks`."""
    masks = [torch.empty(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    bits = 64 if any(s.dtype == torch.float64 for s in scores) else 32
    names = [f"scores[{t}]" for t in range(len(scores))]
    _select([[s.contiguous().view(-1)] for s in scores], masks, None, k, bits, names)
    return masks


def top_k_similarity_masks(g: Tensors, v: Tensors, g0: Tensors, a: Tensor | None, k: int) -> list[Tensor | None]:
    """See :func:`torch_mdgd.kernels.top_k_similarity_masks`."""
    like = [next((x for x in tensors if x is not None), None) for tensors in zip(g, v, g0, strict=True)]
    present = [t for t, x in enumerate(like) if x is not None]
    masks = [None if x is None else torch.empty(x.shape, dtype=torch.bool, device=x.device) for x in like]
    parts = [[None if (x := vector[t]) is None else x.contiguous().view(-1) for vector in (g, v, g0)] for t in present]
    scale = None if a is None else a.double()[present].contiguous()
    names = [f"the similarity of parameter {t}" for t in present]
    _select(parts, [mask for mask in masks if mask is not None], scale, k, 64, names)
    return masks


def _select(
    parts: Sequence[Sequence[Tensor | None]],
    masks: Sequence[Tensor],
    scale: Tensor | None,
    k: int,
    bits: int,
    names: Sequence[str],
) -> None:
    """Fill the masks. ``parts`` are the scores of each tensor, or the g, v and g0 that they are computed from."""
    numels = [mask.numel() for mask in masks]
    total = sum(numels)
    if not 1 <= k <= total:
        raise ValueError(f"k must be within 1 and the {total} scores, not {k}")
    device = masks[0].device
    lists = chunks.groups([[m.view(-1), *tensors] for m, tensors in zip(masks, parts, strict=True)], numels, device)
    # The bits known of the threshold, and how many numbers are wanted among those that share them.
    state = torch.tensor([0, k], dtype=torch.int64, device="cpu").to(device)
    bins = torch.zeros(1 << DIGIT, dtype=torch.int64, device=device)
    nan = torch.zeros(len(masks), dtype=torch.int64, device=device)
    ties = torch.zeros(sum(chunks.tile_counts(numels)), dtype=torch.int64, device=device)

    def launch(kernel: "triton.JITFunction[..., None]", *buffers: Tensor, **constants: int) -> None:
        for group in lists:
            kernel[(len(group.tiles),)](
                group.addresses, group.numels, group.places, group.tiles, scale, state, *buffers,
                PATTERN=group.pattern, CODES=group.codes, ALIGNED=group.aligned, TILE=chunks.TILE, BITS=bits,
                **chunks.OPTIONS, **constants,
            )  # fmt: skip

    with chunks.on_device(device):
        known = 0
        while known < bits:
            width = min(DIGIT, bits - known)
            launch(_count_kernel, bins, nan, KNOWN=known, WIDTH=width)
            _digit_kernel[(1,)](bins, state, width, 1 << DIGIT, **chunks.OPTIONS)
            known += width
        launch(_ties_kernel, ties)
        launch(_mask_kernel, ties.cumsum(0) - ties)
    refused = nan.nonzero().flatten().tolist()
    if refused:
        raise ValueError(f"{names[refused[0]]} has a NaN, which has no place in an order")


@triton.jit
def _scores(
    addresses, scale, offsets, numel,
    PATTERN: tl.constexpr, CODES: tl.constexpr, ALIGNED: tl.constexpr, BITS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The scores of a tile: as they are, or (g − a · v) ⊙ g0."""
    DTYPE: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    parts = ()
    for i in tl.static_range(1, len(PATTERN)):
        if PATTERN[i] >= 0 and (i != 2 or scale is not None):
            x = load(tl.load(addresses + PATTERN[i]), offsets, numel, CODES[PATTERN[i]], ALIGNED, FULL).to(DTYPE)
        else:
            x = tl.zeros(offsets.shape, dtype=DTYPE)
        parts += (x,)
    scores = parts[0]
    if len(PATTERN) > 2:
        if scale is not None:
            scores = scores - tl.load(scale) * parts[1]
        scores = scores * parts[2]
    return scores


@triton.jit
def _keys(
    addresses, numels, places, tiles, scale,
    PATTERN: tl.constexpr, CODES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Of this program's tile: unsigned keys in the order of the scores, which are numbers, and which are NaN."""
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(tiles + program * 3)
    start = tl.multiple_of(tl.load(tiles + program * 3 + 1), TILE)
    offsets = start + tl.arange(0, TILE)
    numel = tl.load(numels + row)
    addresses += row * len(CODES)
    if scale is not None:
        scale += tl.load(places + row)
    if start + TILE <= numel:
        scores = _scores(addresses, scale, offsets, numel, PATTERN, CODES, ALIGNED, BITS, True)
    else:
        scores = _scores(addresses, scale, offsets, numel, PATTERN, CODES, ALIGNED, BITS, False)
    scores = tl.where(scores == 0, 0.0, scores)
    if BITS == 64:
        bits = scores.to(tl.int64, bitcast=True)
        keys = (bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.uint64, bitcast=True) ^ 0x8000000000000000
    else:
        bits = scores.to(tl.int32, bitcast=True)
        keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000).to(tl.uint64)
    return keys, offsets < numel, scores != scores


@triton.jit
def _count_kernel(
    addresses, numels, places, tiles, scale, state, bins, nan,
    PATTERN: tl.constexpr, CODES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
    KNOWN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    keys, valid, odd = _keys(addresses, numels, places, tiles, scale, PATTERN, CODES, ALIGNED, TILE, BITS)
    if KNOWN == 0:
        if tl.max((valid & odd).to(tl.int32), 0) > 0:
            row = tl.load(tiles + tl.program_id(0).to(tl.int64) * 3)
            tl.store(nan + tl.load(places + row), 1)
    else:
        valid = valid & (keys >> (BITS - KNOWN) == tl.load(state).to(tl.uint64))
    digits = (keys >> (BITS - KNOWN - WIDTH)) & ((1 << WIDTH) - 1)
    counts = tl.histogram(digits.to(tl.int32), 1 << WIDTH, mask=valid)
    tl.atomic_add(bins + tl.arange(0, 1 << WIDTH), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _digit_kernel(bins, state, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    counts = tl.load(bins + index)
    wanted = tl.load(state + 1)
    at_least = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((at_least >= wanted).to(tl.int64), 0) - 1
    above = tl.sum(tl.where(index > digit, counts, 0), 0)
    tl.store(state, (tl.load(state) << WIDTH) | digit)
    tl.store(state + 1, wanted - above)
    tl.store(bins + index, tl.zeros((SIZE,), dtype=tl.int64))


@triton.jit
def _ties_kernel(
    addresses, numels, places, tiles, scale, state, ties,
    PATTERN: tl.constexpr, CODES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    keys, valid, _ = _keys(addresses, numels, places, tiles, scale, PATTERN, CODES, ALIGNED, TILE, BITS)
    tie = valid & (keys == tl.load(state).to(tl.uint64, bitcast=True))
    slot = tl.load(tiles + tl.program_id(0).to(tl.int64) * 3 + 2)
    tl.store(ties + slot, tl.sum(tie.to(tl.int64), 0))


@triton.jit
def _mask_kernel(
    addresses, numels, places, tiles, scale, state, before,
    PATTERN: tl.constexpr, CODES: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    keys, valid, _ = _keys(addresses, numels, places, tiles, scale, PATTERN, CODES, ALIGNED, TILE, BITS)
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(tiles + program * 3)
    threshold = tl.load(state).to(tl.uint64, bitcast=True)
    tie = valid & (keys == threshold)
    rank = tl.load(before + tl.load(tiles + program * 3 + 2)) + tl.cumsum(tie.to(tl.int32), 0)
    chosen = (keys > threshold) | (tie & (rank <= tl.load(state + 1)))
    offsets = tl.multiple_of(tl.load(tiles + program * 3 + 1), TILE) + tl.arange(0, TILE)
    mask = pointer(tl.load(addresses + row * len(CODES) + PATTERN[0]), CODES[PATTERN[0]], ALIGNED) + offsets
    tl.store(mask, chosen.to(tl.int8), mask=valid)

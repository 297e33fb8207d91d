"""A list of parameters as tiles: where each tile is in memory, in tables that a kernel can read.

A program of a kernel does one tile of one parameter. It reads its parameter's number and its first element from the
tables, and from those the addresses of the tensors, so that one launch serves tensors of any number and size.
"""

# Kernels are typed by Triton, not by Python.
# mypy: disable-error-code="assignment, no-untyped-call, no-untyped-def, untyped-decorator"

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers per program: eight a thread, which for half precision is one load of 128 bits.
TILE = 2048
WARPS = 8
# Without fused multiply-add a number is rounded as the other backends round it.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool)


class Group(NamedTuple):
    """Parameters whose tensors have the same dtypes, so that one kernel serves them all; N tiles of P parameters."""

    pattern: tuple[int, ...]
    """Which of the parameter's tensors plays which part, −1 for none: an index into ``codes``."""

    codes: tuple[int, ...]
    """The dtypes of the parameter's distinct tensors, as indices into DTYPES."""

    aligned: bool
    """Whether all addresses are multiples of 16 bytes."""

    addresses: Tensor
    """int64, shape (P, len(codes))."""

    numels: Tensor
    """int64, shape (P,)."""

    places: Tensor
    """int64, shape (P,): the parameters' places in the list."""

    tiles: Tensor
    """int64, shape (N, 3): row of this group, first element, and number of the tile in the whole list."""


def tile_counts(numels: Sequence[int]) -> list[int]:
    """How many tiles each parameter has."""
    return [-(-n // TILE) for n in numels]


def groups(parts: Sequence[Sequence[Tensor | None]], numels: Sequence[int], device: torch.device) -> list[Group]:
    """Sort parameters by the dtypes of their tensors.

    Args:
        parts: for each parameter its contiguous tensors, or None; parameters without numbers are left out.
        numels: the parameters' lengths.
        device: where the tables go. The copy does not wait for the device.
    """
    alike: dict[tuple[tuple[int, ...], tuple[int, ...], bool], list[tuple[int, list[int]]]] = {}
    for t, (tensors, numel) in enumerate(zip(parts, numels, strict=True)):
        if not numel:
            continue
        distinct = {x.data_ptr(): DTYPES.index(x.dtype) for x in tensors if x is not None}
        order = list(distinct)
        pattern = tuple(-1 if x is None else order.index(x.data_ptr()) for x in tensors)
        aligned = all(address % 16 == 0 for address in order)
        alike.setdefault((pattern, tuple(distinct.values()), aligned), []).append((t, order))
    counts = tile_counts(numels)
    first = list(accumulate(counts, initial=0))
    return [_group(*key, members, numels, counts, first, device) for key, members in alike.items()]


def _group(
    pattern: tuple[int, ...],
    codes: tuple[int, ...],
    aligned: bool,
    members: list[tuple[int, list[int]]],
    numels: Sequence[int],
    counts: list[int],
    first: list[int],
    device: torch.device,
) -> Group:
    places = _whole([t for t, _ in members])
    count = _whole([counts[t] for t, _ in members])
    row = torch.repeat_interleave(_whole(range(len(members))), count)
    within = _whole(range(len(row))) - (count.cumsum(0) - count)[row]
    tiles = torch.stack([row, within * TILE, _whole(first)[places][row] + within], dim=1)
    addresses = _whole([order for _, order in members])
    tables = (addresses, _whole([numels[t] for t, _ in members]), places, tiles)
    return Group(pattern, codes, aligned, *upload(tables, device))


def _whole(numbers: Sequence[int] | Sequence[list[int]]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def upload(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy int64 tables to the device in one transfer that nobody waits for."""
    packed = torch.cat([table.reshape(-1) for table in tables])
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = packed.split([table.numel() for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def pointer(address, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address as a pointer to numbers of the coded dtype."""
    if CODE == 0:
        p = address.to(tl.pointer_type(tl.float32))
    elif CODE == 1:
        p = address.to(tl.pointer_type(tl.bfloat16))
    elif CODE == 2:
        p = address.to(tl.pointer_type(tl.float16))
    elif CODE == 3:
        p = address.to(tl.pointer_type(tl.float64))
    else:
        p = address.to(tl.pointer_type(tl.int8))
    if ALIGNED:
        # With this the compiler may load 128 bits at a time.
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def load(address, offsets, numel, CODE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """A tile of numbers, loaded in their dtype and then float32, or float64 as they were; beyond the end, zeros."""
    p = pointer(address, CODE, ALIGNED)
    x = tl.load(p + offsets) if FULL else tl.load(p + offsets, mask=offsets < numel, other=0)
    if CODE != 3:
        x = x.to(tl.float32)
    return x

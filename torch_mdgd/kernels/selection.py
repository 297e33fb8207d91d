"""Exact top-k over a list of tensors in plain torch: a bracket from a sample, then selection inside the bracket.

The k-th largest of n numbers lies, almost always, between two order statistics of a small sample that leave
about one number in a hundred between them. One pass over the data counts what lies above and collects what lies
between, and only that is ordered (Floyd and Rivest, "Expected time bounds for selection", CACM 1975).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_mdgd.kernels.types import Tensors

# How many scores are looked at together: float32 ones that exist, float64 ones that are computed from three vectors.
BLOCK = 1 << 18
COMPUTED_BLOCK = 1 << 16
SAMPLE = 1 << 16
# In standard deviations of a rank in the sample: a miss, once in some 400 lists, costs another pass.
SPREAD = 3.0


class Source(NamedTuple):
    """Where the scores of a list of tensors come from."""

    read: Callable[[int, slice | Tensor], Tensor]
    """(t, where) gives the scores of tensor t at a slice or at positions, in one floating dtype for all tensors."""

    names: list[str]
    """What to call tensor t in an error."""

    block: int
    """How many scores to read at once."""


def top_k_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """See :func:`torch_mdgd.kernels.top_k_masks`."""
    source, masks = of_scores(scores)
    select(source, masks, k)
    return masks


def top_k_similarity_masks(g: Tensors, v: Tensors, g0: Tensors, a: Tensor | None, k: int) -> list[Tensor | None]:
    """See :func:`torch_mdgd.kernels.top_k_similarity_masks`."""
    source, masks, present = of_similarities(g, v, g0, a)
    select(source, masks, k)
    found = iter(masks)
    return [next(found) if t in present else None for t in range(len(g))]


def of_scores(scores: Sequence[Tensor]) -> tuple[Source, list[Tensor]]:
    """Where given scores come from, and masks to be filled."""
    flat = [s.reshape(-1) for s in scores]
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
    masks = [torch.empty(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    names = [f"scores[{t}]" for t in range(len(scores))]
    return Source(lambda t, where: _at(flat[t], where).to(dtype), names, BLOCK), masks


def of_similarities(g: Tensors, v: Tensors, g0: Tensors, a: Tensor | None) -> tuple[Source, list[Tensor], list[int]]:
    """Where similarities come from, masks to be filled, and which parameters have one."""
    like = [next((x for x in xs if x is not None), None) for xs in zip(g, v, g0, strict=True)]
    masks = [torch.empty(x.shape, dtype=torch.bool, device=x.device) for x in like if x is not None]
    present = [t for t, x in enumerate(like) if x is not None]
    flat = [[None if (x := vector[t]) is None else x.reshape(-1) for vector in (g, v, g0)] for t in present]
    scalars = None if a is None else a.double()[present].tolist()

    def read(p: int, where: slice | Tensor) -> Tensor:
        some = _at(next(x for x in flat[p] if x is not None), where)
        task, visual, reference = (
            some.new_zeros(some.shape, dtype=torch.float64) if x is None else _at(x, where).double() for x in flat[p]
        )
        return (task if scalars is None else task - scalars[p] * visual) * reference

    source = Source(read, [f"the similarity of parameter {t}" for t in present], COMPUTED_BLOCK)
    return source, masks, present


def _at(x: Tensor, where: slice | Tensor) -> Tensor:
    # Which takes a fifth of the time that indexing does.
    return x.index_select(0, where) if isinstance(where, Tensor) else x[where]


def select(source: Source, masks: list[Tensor], k: int) -> None:
    """Fill contiguous bool masks with exactly k true values, where the scores are largest; ties to the lowest index.

    Raises:
        ValueError: k is not within 1 … total count, or a score is NaN (the message has its tensor's name).
    """
    flat = [mask.view(-1) for mask in masks]
    total = sum(len(mask) for mask in flat)
    if not 1 <= k <= total:
        raise ValueError(f"k must be within 1 and the {total} scores, not {k}")
    if total <= SAMPLE:
        scores = torch.cat([scores for _, scores, *_ in _walk(source, flat)])
        for mask, chosen in zip(flat, _largest(scores, k).split([len(mask) for mask in flat]), strict=True):
            mask.copy_(chosen)
        return
    sample = sample_of(source, flat, total)
    for attempt in itertools.count():
        low, high = bracket(sample, k / total, SPREAD * 8**attempt)
        edge = _try_between(source, flat, k, low, high) if low < high else low
        if edge is None or _try_ties(source, flat, k, edge):
            return


def _try_between(source: Source, masks: list[Tensor], k: int, low: float, high: float) -> float | None:
    """Fill the masks if the k-th largest score lies strictly between low and high.

    Returns:
        None if it does; else the edge of the bracket at or beyond which it lies.
    """
    above_low = at_high = 0
    between: list[tuple[Tensor, Tensor, Tensor]] = []
    for mask, scores, buffer, other in _walk(source, masks):
        # A comparison into floats and a copy to bool take half the time of a comparison into bool.
        above = torch.gt(scores, low, out=buffer)
        reach = torch.ge(scores, high, out=other)
        mask.copy_(above)
        above_low += int(above.sum())
        at_high += int(reach.sum())
        undecided = _nonzero(above.sub_(reach).bool())
        between.append((mask, undecided, scores[undecided]))
    if k < at_high:
        return high
    if k > above_low:
        return low
    chosen = _largest(torch.cat([scores for _, _, scores in between]), k - at_high)
    for (mask, undecided, _), part in zip(between, chosen.split([len(u) for _, u, _ in between]), strict=True):
        mask[undecided] = part
    return None


def _try_ties(source: Source, masks: list[Tensor], k: int, threshold: float) -> bool:
    """Fill the masks if the k-th largest score equals the threshold."""
    above = ties = 0
    for mask, scores, buffer, other in _walk(source, masks):
        greater = torch.gt(scores, threshold, out=buffer)
        mask.copy_(greater)
        above += int(greater.sum())
        ties += int(torch.eq(scores, threshold, out=other).sum())
    if not above <= k <= above + ties:
        return False
    needed = k - above
    for mask, scores, buffer, other in _walk(source, masks):
        if not needed:
            break
        equal = torch.eq(scores, threshold, out=buffer)
        count = int(equal.sum())
        if count <= needed:
            mask.copy_(torch.ge(scores, threshold, out=other))
        else:
            mask[equal.nonzero().squeeze(1)[:needed]] = True
        needed -= min(count, needed)
    return True


def _walk(source: Source, masks: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Block by block: the block of the mask, its scores, and two buffers of their shape and dtype.

    Raises:
        ValueError: a score is NaN.
    """
    buffers: Tensor | None = None
    for t, mask in enumerate(masks):
        for start in range(0, len(mask), source.block):
            part = mask[start : start + source.block]
            scores = source.read(t, slice(start, start + len(part)))
            if bool(scores.amax().isnan()):
                raise ValueError(has_nan(source, t))
            if buffers is None:
                buffers = scores.new_empty(2, source.block)
            yield part, scores, buffers[0, : len(part)], buffers[1, : len(part)]


def has_nan(source: Source, t: int) -> str:
    """What to say of a NaN among the scores of tensor t."""
    return f"{source.names[t]} has a NaN, which has no place in an order"


def _nonzero(flags: Tensor) -> Tensor:
    """Where a flat bool tensor is true, looking at eight numbers at a time, for it is mostly false."""
    if len(flags) % 8:
        return flags.nonzero().squeeze(1)
    octets = flags.view(torch.int64).nonzero()
    positions = (octets * 8 + torch.arange(8, dtype=torch.int64, device=flags.device)).flatten()
    return positions[flags[positions]]


def _largest(scores: Tensor, k: int) -> Tensor:
    """A bool mask of the k largest of a flat tensor without NaN, k ≥ 0, the first of those that tie."""
    if not k:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = torch.kthvalue(scores, len(scores) - k + 1).values
    chosen = scores > threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen


def sample_of(source: Source, masks: list[Tensor], total: int) -> Tensor:
    """One score at a random place in each of SAMPLE equal stretches of the list."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    within = torch.rand(SAMPLE, generator=generator, dtype=torch.float32, device="cpu")
    places = torch.arange(SAMPLE, dtype=torch.float64, device="cpu").add_(within)
    places = (places * (total / SAMPLE)).long().clamp_(max=total - 1)
    ends = list(itertools.accumulate(mask.numel() for mask in masks))
    cuts = torch.searchsorted(places, torch.tensor(ends, dtype=torch.int64, device="cpu")).tolist()
    parts = []
    for t, (first, last) in enumerate(itertools.pairwise([0, *cuts])):
        start = ends[t] - masks[t].numel()
        parts.append(source.read(t, (places[first:last] - start).to(masks[t].device)))
    return torch.cat(parts)


def bracket(sample: Tensor, fraction: float, spread: float) -> tuple[float, float]:
    """Two scores of the sample that have the wanted fraction of all scores between them, give or take the spread."""
    n = len(sample)
    deviation = spread * math.sqrt(n * fraction * (1 - fraction)) + 1
    # Ranks from the smallest, the first of which is 1.
    low, high = math.floor(n * (1 - fraction) - deviation), math.ceil(n * (1 - fraction) + deviation)
    return (
        float(sample.kthvalue(low).values) if low >= 1 else -math.inf,
        float(sample.kthvalue(high).values) if high <= n else math.inf,
    )

"""Exact top-k over sharded tensors, digit by digit: what one process would choose from whole tensors."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_mdgd.parallel.dtensor import as_shard, indices, is_sharded, local, sum_shards_

Keys: TypeAlias = Callable[[], Iterator[tuple[int, slice, Tensor]]]

# How many scores are looked at together.
BLOCK = 1 << 20
# A score is found in four passes, sixteen bits of it in each.
DIGIT = 16
LARGEST = torch.iinfo(torch.int64).max


def top_k_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """See :func:`torch_mdgd.kernels.top_k_masks`."""
    flat = [x.reshape(-1) for x in local(scores)]
    return _select(scores, lambda t, where: flat[t][where].double(), k)


def top_k_similarity_masks(vectors: Sequence[Sequence[Tensor]], a: Tensor, k: int) -> list[Tensor]:
    """See :func:`torch_mdgd.kernels.top_k_similarity_masks`, for the vectors (g, v, g₀)."""
    flat = [[x.reshape(-1) for x in local(vector)] for vector in vectors]

    def read(t: int, where: slice) -> Tensor:
        task, visual, reference = (vector[t][where].double() for vector in flat)
        scores: Tensor = (task - a[t] * visual) * reference
        return scores

    return _select(vectors[0], read, k)


def _select(like: Sequence[Tensor], read: Callable[[int, slice], Tensor], k: int) -> list[Tensor]:
    """Masks, sharded as ``like``, of the k largest scores; ``read`` gives a stretch of a local part's in float64."""
    total = sum(x.numel() for x in like)
    if not 1 <= k <= total:
        raise ValueError(f"k must be within 1 and the {total} scores, not {k}")
    masks = [torch.zeros(x.shape, dtype=torch.bool, device=x.device) for x in local(like)]
    flat = [mask.view(-1) for mask in masks]

    def keys(tensors: Sequence[int]) -> Iterator[tuple[int, slice, Tensor]]:
        for t in tensors:
            for start in range(0, len(flat[t]), BLOCK):
                where = slice(start, min(start + BLOCK, len(flat[t])))
                yield t, where, _ordered(read(t, where))

    everything = range(len(like))
    threshold, above = _kth_largest(lambda: keys(everything), like, k)
    ties = torch.zeros(len(like), 2, dtype=torch.int64, device=flat[0].device)
    for t, where, block in keys(everything):
        flat[t][where] = block > threshold
        ties[t] += torch.stack([(block == threshold).sum(), (block == LARGEST).sum()])
    counts, nans = sum_shards_(ties, like).unbind(1)
    if bool(nans.any()):
        raise ValueError(f"the similarity of parameter {int(nans.argmax())} has a NaN, which has no place in an order")
    needed = k - above
    for t, found in enumerate(counts.tolist()):
        taken = min(found, needed)
        needed -= taken
        if taken:
            tied = [block == threshold for _, _, block in keys([t])]
            chosen = torch.cat([*tied, flat[t][:0]]).nonzero().squeeze(1)
            flat[t][chosen if taken == found else chosen[_first(like[t], chosen, taken)]] = True
    return [as_shard(mask, x) for mask, x in zip(masks, like, strict=True)]


def _first(x: Tensor, positions: Tensor, n: int) -> Tensor:
    """Which of the positions in this rank's part are among the first n of all ranks', counting in the whole x."""
    # Larger is earlier.
    keys: Tensor = ~indices(x)[positions]
    last, _ = _kth_largest(lambda: iter([(0, slice(None), keys)]), [x], n)
    return keys >= last


def _kth_largest(keys: Keys, like: Sequence[Tensor], k: int) -> tuple[int, int]:
    """The k-th largest of the ranks' int64 keys, which are those of parts of T tensors, and how many are larger.

    Digit by digit: a histogram of the keys that begin as it does, added up over ranks, tells its next sixteen bits.
    """
    kinds: dict[Any, int] = {}
    kind = [kinds.setdefault(_shards(x), len(kinds)) for x in like]
    examples = [like[kind.index(i)] for i in range(len(kinds))]
    key, above = 0, 0
    for shift in range(64 - DIGIT, -1, -DIGIT):
        histograms = torch.zeros(len(kinds), 1 << DIGIT, dtype=torch.int64, device=like[0].device)
        for t, _, block in keys():
            if shift + DIGIT < 64:
                digits = (block[block >> (shift + DIGIT) == key] >> shift) & ((1 << DIGIT) - 1)
            else:
                digits = (block >> shift) + (1 << (DIGIT - 1))
            histograms[kind[t]] += torch.bincount(digits, minlength=1 << DIGIT)
        at_least = sum_shards_(histograms, examples).sum(0).flip(0).cumsum(0)
        place = int((at_least < k - above).sum())
        above += int(at_least[place - 1]) if place else 0
        digit = (1 << DIGIT) - 1 - place
        key = (key << DIGIT) | digit if shift + DIGIT < 64 else digit - (1 << (DIGIT - 1))
    return key, above


def _ordered(scores: Tensor) -> Tensor:
    """Integers in the order of float64 scores: −0 as 0, and NaN above all."""
    bits = (scores + 0.0).view(torch.int64)
    return (bits ^ ((bits >> 63) & LARGEST)).masked_fill_(scores.isnan(), LARGEST)


def _shards(x: Tensor) -> Any:
    tensor: Any = x
    return (tensor.device_mesh, *(p.is_replicate() for p in tensor.placements)) if is_sharded(x) else None

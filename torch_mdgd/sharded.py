"""The kernels on tensors that are sharded over processes, exact: what one process would compute from whole tensors.

Under ``fully_shard`` (FSDP2) parameters, gradients, φ, masks and optimizer state are DTensors, of which each rank holds
a part. Pointwise arithmetic needs nothing; the operations that look across a tensor are here, with the signatures of
:mod:`torch_mdgd.kernels`: they run on the local parts, and sums and counts are added up over the mesh dimensions that
a tensor is sharded on, all tensors in one all-reduce. Ranks that hold the same part (HSDP) are not added up.

Tensors of one process pass through untouched.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_mdgd import kernels
from torch_mdgd.kernels import Role, Similarity

Keys: TypeAlias = Callable[[], Iterator[tuple[int, slice, Tensor]]]

# How many scores are looked at together.
BLOCK = 1 << 20
# A score is found in four passes, sixteen bits of it in each.
DIGIT = 16
LARGEST = torch.iinfo(torch.int64).max


def is_sharded(x: Tensor | None) -> bool:
    """Whether x is a DTensor; told by an attribute, as importing DTensor takes a second that few need to spend."""
    return type(x) not in (Tensor, nn.Parameter) and hasattr(x, "placements")


def local(tensors: Role) -> list[Any]:
    """This rank's parts, which share memory with the tensors."""
    return [x.to_local() if is_sharded(x) else x for x in tensors]  # type: ignore[union-attr]


def shard_like(x: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of x, which every rank holds or which is sharded, on the device and with the shards of ``like``."""
    source: Any = x
    target: Any = like
    if is_sharded(like) and is_sharded(x):
        source = source.redistribute(target.device_mesh, target.placements)
    elif is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        source = distribute_tensor(x.to(like.device), target.device_mesh, target.placements, src_data_rank=None)
    elif is_sharded(x):
        source = source.full_tensor()
    copy: Tensor = source.to(like.device, dtype or x.dtype, copy=True)
    return copy


def same_shards(x: Tensor, y: Tensor) -> bool:
    """Whether both are whole, or their parts are the same."""
    one: Any = x
    other: Any = y
    if is_sharded(x) and is_sharded(y):
        return bool(one.device_mesh == other.device_mesh and one.placements == other.placements)
    return not is_sharded(x) and not is_sharded(y)


def same_place(x: Tensor, y: Tensor) -> bool:
    """Whether both are on one device, with the same shards."""
    return x.device == y.device and same_shards(x, y)


def as_part(part: Tensor, like: Tensor) -> Tensor:
    """Some of this rank's numbers of ``like``, shape (m,), m being each rank's own, as what the kernels here take."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor, Replicate, Shard

    target: Any = like
    placements = [Replicate() if x.is_replicate() else Shard(0) for x in target.placements]
    out: Tensor = DTensor.from_local(
        part, target.device_mesh, placements, run_check=False, shape=torch.Size([like.numel()]), stride=(1,)
    )
    return out


def indices(like: Tensor) -> Tensor:
    """Where the numbers of this rank's part stand in the whole tensor, flattened: int64, shape (numel of the part,)."""
    whole = torch.arange(like.numel(), device=like.device).view(like.shape)
    index: Tensor = local([shard_like(whole, like)])[0].reshape(-1)
    return index


def in_whole(positions: Tensor, values: Sequence[Tensor], like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """All ranks' positions in their parts of a sharded tensor as ascending ones in the whole, with what is there.

    Args:
        positions: of this rank's part, flattened, shape (m,), m being each rank's own.
        values: 1-D tensors of a number for each.
        like: the tensor.

    Returns:
        positions, in int32 if that is wide enough, and the values in their order: the same on all ranks.
    """
    dtype = torch.int32 if like.numel() <= torch.iinfo(torch.int32).max else torch.int64
    if not is_sharded(like):
        return positions.to(dtype), list(values)
    found, order = gather(indices(like)[positions.long()], like).sort()
    return found.to(dtype), [gather(x, like)[order] for x in values]


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    tensor: Any = x
    found: Tensor = tensor.full_tensor() if is_sharded(x) else x
    return found


def gather(part: Tensor, like: Tensor) -> Tensor:
    """What the ranks hold of 1-D parts, of any sizes, one after the other; all ranks call it, and all get it."""
    tensor: Any = like
    for dim, placement in enumerate(tensor.placements if is_sharded(like) else ()):
        if not placement.is_replicate():
            part = _gather_over(part, tensor.device_mesh.get_group(dim))
    return part


def _gather_over(part: Tensor, group: Any) -> Tensor:
    ranks = range(torch.distributed.get_world_size(group))
    sizes = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in ranks]
    torch.distributed.all_gather(sizes, torch.full_like(sizes[0], part.numel()), group)
    lengths = [int(n) for n in sizes]
    if not any(lengths):
        return part
    padded = part.new_zeros(max(lengths))
    padded[: part.numel()] = part
    parts = [torch.empty_like(padded) for _ in ranks]
    torch.distributed.all_gather(parts, padded, group)
    return torch.cat([x[:n] for x, n in zip(parts, lengths, strict=True)])


# --------------------------------------------------------------------------------------------------------------
# The kernels on shards.


@torch.no_grad()
def inner_products(rows: Sequence[Role], columns: Sequence[Role] | None = None) -> Tensor:
    """:func:`torch_mdgd.kernels.inner_products` of whole tensors: the same on all ranks."""
    others = None if columns is None else [local(role) for role in columns]
    table = kernels.inner_products([local(role) for role in rows], others)
    every = (*rows, *(columns or ()))
    return sum_shards_(table, [next((x for x in xs if x is not None), None) for xs in zip(*every, strict=True)])


@torch.no_grad()
def combine_(
    out: Role, roles: Sequence[Role], coefficients: Tensor, masks: Sequence[Tensor | None] | None = None
) -> None:
    """:func:`torch_mdgd.kernels.combine_`, part by part."""
    kernels.combine_(local(out), [local(role) for role in roles], coefficients, None if masks is None else local(masks))


@torch.no_grad()
def counts(masks: Sequence[Tensor]) -> list[int]:
    """How many numbers are true in each whole mask. A collective operation: all ranks call it."""
    if not masks:
        return []
    found: list[int] = sum_shards_(torch.stack([m.sum() for m in local(masks)]), masks).tolist()
    return found


def count(masks: Sequence[Tensor]) -> int:
    """How many numbers are true in whole masks. A collective operation: all ranks call it."""
    return sum(counts(masks))


@torch.no_grad()
def top_k_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """:func:`torch_mdgd.kernels.top_k_masks`: k in all, ties to the lowest index of the whole tensors."""
    if not any(map(is_sharded, scores)):
        return kernels.top_k_masks(scores, k)
    flat = [x.reshape(-1) for x in local(scores)]
    return _select(scores, lambda t, where: flat[t][where].double(), k)


@torch.no_grad()
def top_k_similarity_masks(
    g: Sequence[Tensor], v: Sequence[Tensor], g0: Sequence[Tensor], a: Tensor, k: int, similarity: Similarity
) -> list[Tensor]:
    """:func:`torch_mdgd.kernels.top_k_similarity_masks`: k in all, ties to the lowest index of the whole tensors."""
    if not any(map(is_sharded, g)):
        return [m for m in kernels.top_k_similarity_masks(g, v, g0, a, k, similarity) if m is not None]
    flat = [[x.reshape(-1) for x in local(role)] for role in (g, v, g0)]

    def read(t: int, where: slice) -> Tensor:
        task, visual, reference = (role[t][where].double() for role in flat)
        scores: Tensor = similarity(task - a[t] * visual, reference).double()
        return scores

    return _select(g, read, k)


def sum_shards_(table: Tensor, like: Role) -> Tensor:
    """Add up, in place, each row over the ranks that hold the other parts of its tensor.

    Args:
        table: T rows.
        like: T tensors; the row of one that is not sharded, or of None, stays as it is.
    """
    places: dict[tuple[Any, int], list[int]] = {}
    for t, x in enumerate(like):
        tensor: Any = x
        for dim, placement in enumerate(tensor.placements if is_sharded(x) else ()):
            if not placement.is_replicate():
                places.setdefault((tensor.device_mesh, dim), []).append(t)
    for (mesh, dim), rows in places.items():
        part = table[rows]
        torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        table[rows] = part
    return table


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
    return [_as_shard(mask, x) for mask, x in zip(masks, like, strict=True)]


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


def _as_shard(part: Tensor, like: Tensor) -> Tensor:
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    target: Any = like
    whole: Tensor = DTensor.from_local(
        part, target.device_mesh, target.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole


def refuse_sharded(what: str, parameters: Sequence[Tensor], instead: str) -> None:
    """Raise a ValueError if a parameter is sharded."""
    if any(map(is_sharded, parameters)):
        raise ValueError(f"{what}: parameters are sharded by fully_shard, which is not supported: {instead}")

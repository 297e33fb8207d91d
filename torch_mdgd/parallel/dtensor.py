"""Tensors that are sharded over processes: DTensors, as ``fully_shard`` (FSDP2) makes them.

Each process holds a shard. Pointwise arithmetic needs nothing else; sums over a whole tensor are added up over the mesh
dimensions that it is sharded on, for all tensors in one all-reduce. Processes that hold the same shard (HSDP) are not
added up. Tensors of one process pass through untouched.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def is_sharded(x: Tensor | None) -> bool:
    """Whether x is a DTensor; told by an attribute, as importing DTensor takes a second that few need to spend."""
    return type(x) not in PLAIN and hasattr(x, "placements")


def any_sharded(lists: Sequence[Sequence[Tensor | None]]) -> bool:
    """Whether there is a DTensor in these lists."""
    kinds = set().union(*(map(type, tensors) for tensors in lists)) - {*PLAIN, type(None)}
    return any(hasattr(kind, "placements") for kind in kinds)


def local(tensors: Sequence[Tensor | None]) -> list[Any]:
    """This rank's shards, which share memory with the tensors."""
    if not any_sharded([tensors]):
        return list(tensors)
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
    """Whether both are whole, or both are sharded alike."""
    one: Any = x
    other: Any = y
    if is_sharded(x) and is_sharded(y):
        return bool(one.device_mesh == other.device_mesh and one.placements == other.placements)
    return not is_sharded(x) and not is_sharded(y)


def same_place(x: Tensor, y: Tensor) -> bool:
    """Whether both are on one device, with the same shards."""
    # Most are plain, and there may be hundreds of them at every step.
    return x.device == y.device and ((type(x) in PLAIN and type(y) in PLAIN) or same_shards(x, y))


def as_part(part: Tensor, like: Tensor) -> Tensor:
    """Some elements of this rank's shard of ``like``, 1-D and of each rank's own number, as what the kernels take."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor, Replicate, Shard

    target: Any = like
    placements = [Replicate() if x.is_replicate() else Shard(0) for x in target.placements]
    out: Tensor = DTensor.from_local(
        part, target.device_mesh, placements, run_check=False, shape=torch.Size([like.numel()]), stride=(1,)
    )
    return out


def as_shard(part: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor that is sharded as ``like``, as that tensor."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    target: Any = like
    whole: Tensor = DTensor.from_local(
        part, target.device_mesh, target.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole


def indices(like: Tensor) -> Tensor:
    """Positions of this rank's shard in the whole tensor, flattened: int64, shape (elements of the shard,)."""
    whole = torch.arange(like.numel(), dtype=torch.int64, device=like.device).view(like.shape)
    index: Tensor = local([shard_like(whole, like)])[0].reshape(-1)
    return index


def in_whole(positions: Tensor, values: Sequence[Tensor], like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Positions in the ranks' shards as ascending positions in the whole tensor, with the values there.

    Args:
        positions: in this rank's shard, flattened, shape (m,); each rank has its own m.
        values: tensors of shape (m,).
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
    """The ranks' 1-D tensors, of any sizes, one after the other. A collective operation: all ranks call it."""
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


@torch.no_grad()
def counts(masks: Sequence[Tensor]) -> list[int]:
    """How many elements are true in each whole mask. A collective operation: all ranks call it."""
    if not masks:
        return []
    found: list[int] = sum_shards_(torch.stack([m.sum() for m in local(masks)]), masks).tolist()
    return found


def count(masks: Sequence[Tensor]) -> int:
    """How many elements are true in all whole masks. A collective operation: all ranks call it."""
    return sum(counts(masks))


def sum_shards_(table: Tensor, like: Sequence[Tensor | None]) -> Tensor:
    """Add up, in place, each row over the ranks that hold the other shards of its tensor.

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


def refuse_sharded(what: str, parameters: Sequence[Tensor], instead: str) -> None:
    """Raise a ValueError if a parameter is sharded, or partitioned by DeepSpeed."""
    if any(hasattr(p, "ds_id") for p in parameters):
        raise ValueError(
            f"{what}: parameters are partitioned by DeepSpeed, which is not supported: give the rule to "
            "torch_mdgd.integrations.deepspeed.MDGDEngine"
        )
    if any(map(is_sharded, parameters)):
        raise ValueError(f"{what}: parameters are sharded by fully_shard, which is not supported: {instead}")

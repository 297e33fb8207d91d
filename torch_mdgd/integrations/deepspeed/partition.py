"""A parameter in ZeRO-3: ``ds_tensor`` is this process's part, padded to as much as the others have."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_partitioned(p: Tensor) -> bool:
    """Whether ZeRO-3 has divided a parameter."""
    return hasattr(p, "ds_id")


def held_of(p: Any) -> Tensor:
    """What this process holds of a parameter."""
    held: Tensor = p.ds_tensor if is_partitioned(p) else p
    return held.detach()


def shape_of(p: Any) -> tuple[int, ...]:
    """Of the whole parameter."""
    return tuple(p.ds_shape if is_partitioned(p) else p.shape)


def gather(p: Any, part: Tensor) -> Tensor:
    """A whole tensor from parts that are divided as the parameter."""
    whole = all_parts(part.reshape(-1).to(p.device), p.ds_process_group)
    return whole[: p.ds_numel].view(p.ds_shape)


def all_parts(part: Tensor, group: Any) -> Tensor:
    """All processes' parts, one after the other."""
    whole = part.new_empty(part.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def padded(whole: Tensor, size: int) -> Tensor:
    """Flat, with zeros up to this size."""
    return nn.functional.pad(whole.reshape(-1), (0, size - whole.numel()))


def release(engine: Any) -> None:
    """Drop what ZeRO-3 has gathered, and wait for what it is gathering."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.empty_partition_cache()


def set_gradient(p: Any, whole: Tensor) -> None:
    """Put a whole gradient where the engine's optimizer looks for it."""
    from deepspeed.utils import safe_set_full_grad

    if is_partitioned(p):
        # It looks for each process's part where that would be with the padding.
        whole = padded(whole, p.ds_tensor.numel() * dist.get_world_size(p.ds_process_group))
    safe_set_full_grad(p, whole)


@torch.no_grad()
def clear_gradients(parameters: Sequence[Tensor]) -> None:
    """ZeRO-3 steps with the last step's gradient of a parameter that this step does not use."""
    from deepspeed.utils import safe_set_local_grad

    for p in filter(is_partitioned, parameters):
        safe_set_local_grad(p, torch.zeros_like(held_of(p)).view(-1))

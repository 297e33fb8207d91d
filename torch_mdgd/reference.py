"""The reference φ: the trainable values as they were when fine-tuning began, and how to evaluate there.

One copy of the trainable numbers, exchanged in place with the live ones. A second model would cost the frozen
numbers too; functional calls and pointer swaps are silently wrong under gradient checkpointing and sharding.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def snapshot(parameters: Iterable[Tensor]) -> list[Tensor]:
    """A detached copy of each parameter."""
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def exchange_(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Swap the contents of each parameter with those of its value, bit for bit.

    ``copy_`` and not ``.data``: autograd then sees the change, and refuses a backward pass through a graph that was
    built on the other values.

    Raises:
        ValueError: a shape or dtype differs, naming the parameter's position.
    """
    for i, (p, x) in enumerate(zip(parameters, values, strict=True)):
        if p.shape != x.shape or p.dtype != x.dtype:
            raise ValueError(
                f"parameter {i} is {p.dtype}, shape {tuple(p.shape)}, but its reference {x.dtype}, {tuple(x.shape)}: "
                "parameters were replaced or cast after MDGDOptimizer was built; wrap the optimizer last"
            )
    for p, x in zip(parameters, values, strict=True):
        held = p.clone()
        p.copy_(x)
        x.copy_(held)
    forget_casts()


def forget_casts() -> None:
    """Drop the low-precision copies that autocast keeps: it does not see that a parameter was written to."""
    torch.clear_autocast_cache()

"""MoFO (Chen et al. 2024, arXiv 2407.20999): of each weight, only the numbers with the largest momentum move.

The optimizer's state is that of all numbers; its move is kept where |m| is among the largest, and taken back elsewhere.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTA = ("exp_avg", "momentum_buffer")
"""What torch's optimizers call m."""


def filter_by_momentum(optimizer: Optimizer, share: float) -> None:
    """From now on, let the steps of an optimizer move this share of each weight alone.

    Vectors, which biases and norms are, move freely, as in the published code. There must be no weight decay, which
    the published code applies to all numbers.

    Args:
        optimizer: with a momentum, Adam's or SGD's.
        share: in (0, 1]; of a weight's numbers, at least one; ties move together.

    Raises:
        ValueError: ``share`` is out of range, or there is weight decay.
        KeyError: after a step, if the optimizer has no momentum.
    """
    if not 0 < share <= 1:
        raise ValueError(f"filter_by_momentum: share must lie in (0, 1], got {share}")
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        raise ValueError("filter_by_momentum: weight_decay must be 0")
    before: dict[Tensor, Tensor] = {}

    def remember(*_: Any) -> None:
        weights = (p for group in optimizer.param_groups for p in group["params"])
        before.update((p, p.detach().clone()) for p in weights if p.dim() > 1 and p.grad is not None)

    @torch.no_grad()
    def take_back(*_: Any) -> None:
        for p, start in before.items():
            p.copy_(torch.where(largest(momentum(optimizer, p), share), p, start))
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(take_back)


def momentum(optimizer: Optimizer, p: Tensor) -> Tensor:
    """M of a parameter.

    Raises:
        KeyError: the optimizer has none.
    """
    state = optimizer.state[p]
    for name in MOMENTA:
        if state.get(name) is not None:
            found: Tensor = state[name]
            return found
    raise KeyError(f"filter_by_momentum: {type(optimizer).__name__} has no momentum ({', '.join(MOMENTA)})")


def largest(m: Tensor, share: float) -> Tensor:
    """Bool tensor of m's shape: true where |m| is among this share of the largest."""
    sizes = m.abs()
    return sizes >= sizes.flatten().topk(max(1, int(share * m.numel()))).values[-1]

"""SPIDER (Huang et al. 2025, arXiv 2411.10928): numbers move by what they matter to the task beside what they mattered.

Of each parameter W, with the sum G of its gradients so far, in the published form (github.com/WenkeHuang/SPIDER):

    old = σ(z(|W₀|)),   new = σ(z(|G|)),   M = new / (old + new) where old < new, and 0 elsewhere

z takes the mean over the parameter away and divides by the deviation. M is divided by the mean of what is not 0, and is
1 at most. After each step W = W₀ + M ⊙ (W − W₀).
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def weigh_by_importance(optimizer: Optimizer) -> None:
    """From now on, weigh what each step of an optimizer has changed by M; W₀ are the parameters now.

    Holds W₀ and G of each parameter that has a gradient. G is of the gradients as the optimizer gets them, clipped.

    Args:
        optimizer: whose parameters are trained.
    """
    held: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}

    def remember(*_: Any) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            if p not in held:
                start = p.detach().clone()
                held[p] = start, sigmoid_rank(start), torch.zeros_like(start)
            held[p][2].add_(p.grad)

    @torch.no_grad()
    def weigh(*_: Any) -> None:
        for p, (start, old, total) in held.items():
            p.copy_(start + importance_mask(old, sigmoid_rank(total)) * (p - start))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(weigh)


def sigmoid_rank(x: Tensor) -> Tensor:
    """σ((|x| − mean) / deviation); ½ where |x| does not vary, and 0 where all of x is."""
    sizes = x.abs()
    if not bool(sizes.any()):
        return torch.zeros_like(x)
    centred = sizes - sizes.mean()
    deviation = sizes.std() if x.numel() > 1 else sizes.new_zeros(())
    return torch.sigmoid(centred / torch.where(deviation > 0, deviation, torch.ones_like(deviation)))


def importance_mask(old: Tensor, new: Tensor) -> Tensor:
    """M, in [0, 1]."""
    found = torch.where(old < new, new / (old + new), torch.zeros_like(new))
    moving = found[found != 0]
    return (found / moving.mean()).clamp(max=1) if len(moving) else found

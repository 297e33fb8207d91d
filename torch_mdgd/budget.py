"""A drift budget: α from how far the visual features may move, where α itself is not portable between models.

What one α does depends on the length of v against that of g, and that on the model, its width and the form of L_v. A
budget δ is a part of the features' own size. At each step

    drift = Σ |z − z(φ)| / Σ |z(φ)|                over image tokens and channels
    q     = drift / δ, held within 1/4 and 4
    s     ← s · q^RATE, held within LIMITS; 1 at first
    α     = align · s · q · ‖g‖ / ‖v‖              over all parameters: α v is align · s · q times as long as g

The factor q is a spring, which damps what s alone would let swing; s finds the pull at which the drift stays near δ.
Neither changes if the losses, or z, are multiplied by a constant. This is ours, not the paper's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_mdgd.equations import ratio
from torch_mdgd.roles import Captures
from torch_mdgd.settings import Group, is_finite

PULL = "drift_pull"
SPAN = 4.0
RATE = 0.05
# A pull ten times as long as g has nothing left to learn with; beyond it, only noise would grow.
LIMITS = (1e-3, 10.0)


class DriftBudget:
    """The controller, whose s lies in the first parameter group, so that it survives checkpoints.

    Nothing here waits for the device, and ranks that are told the same drift hold the same s.

    Args:
        budget: δ > 0, or None for a fixed α.
        groups: the parameter groups, with their settings.

    Raises:
        ValueError: ``budget`` is not a finite number above 0; a group is in step space, or none has ``align`` above 0.
    """

    def __init__(self, budget: float | None, groups: Sequence[Group]) -> None:
        self.budget = budget
        self.recorded: dict[str, Tensor] = {}
        if budget is None:
            return
        if not is_finite(budget) or budget <= 0:
            raise ValueError(f"drift_budget must be a finite number > 0 or None, got {budget!r}")
        self.check_groups(groups)
        groups[0].setdefault(PULL, torch.ones((), dtype=torch.float64))

    def check_groups(self, groups: Sequence[Group]) -> None:
        """Raise a ValueError if a group is in step space, or none has an α to multiply."""
        if self.budget is None:
            return
        if any(group["space"] == "step" for group in groups):
            raise ValueError("drift_budget sets align, which is of gradient space: with space='step', pass restore")
        if not any(group["align"] for group in groups):
            raise ValueError("drift_budget multiplies align: pass an align above 0, such as 1")

    def drift(self, captures: Captures) -> Tensor | None:
        """The drift that this step's captures tell of; None without a budget or without pictures.

        Raises:
            RuntimeError: there is a visual gradient, and nobody has told how far its features have moved.
        """
        if self.budget is None or captures.absent("visual"):
            return None
        if captures.drift is None:
            raise RuntimeError("drift_budget needs the drift: call observe_drift(drift_sums(z, z_ref)) in each step")
        distance, size = captures.drift.unbind()
        return ratio(distance, size)

    def strength(self, drift: Tensor | None, products: Tensor, groups: Sequence[Group]) -> Tensor | float:
        """Take in the drift of one step, and return what multiplies each group's ``align`` in it: 1 without a budget.

        A drift of exactly 0, which is where training begins, says nothing about α and leaves s alone; so do NaN and
        Inf, which a gradient scaler may skip.

        Args:
            drift: float64 scalar, None if there was nothing to measure it on.
            products: inner products of (g, v, ...), one table for each parameter, shape (T, 2, 2) or (T, 3, 3).
            groups: the parameter groups.
        """
        if self.budget is None:
            return 1.0
        held: Any = groups[0].get(PULL, 1.0)
        s, q = torch.as_tensor(held, dtype=torch.float64, device=products.device), torch.ones_like(products[0, 0, 0])
        if drift is not None:
            says = drift.isfinite() & (drift > 0)
            q = torch.where(says, drift / self.budget, q).clamp(1 / SPAN, SPAN)
            # A new tensor: state dicts hold the old one.
            groups[0][PULL] = s = (s * q**RATE).clamp(*LIMITS)
        total = products.sum(0)
        strength = s * q * ratio(total[0, 0], total[1, 1]).sqrt()
        self.recorded = {"align": strength * groups[0]["align"]} | ({} if drift is None else {"visual_drift": drift})
        return strength


def drift_sums(z: Tensor, z_ref: Tensor) -> Tensor:
    """Σ |z − z_ref| and Σ |z_ref|: float64, shape (2,). They add up over micro-batches and ranks.

    Args:
        z: features, shape (tokens, hidden).
        z_ref: those of the same tokens at the reference.
    """
    reference = z_ref.detach().float()
    distances = (z.detach().float() - reference).abs()
    return torch.stack([distances.sum(dtype=torch.float64), reference.abs().sum(dtype=torch.float64)])

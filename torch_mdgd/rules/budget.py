"""A drift budget: α from how far the visual features may move, since one α is not portable between models.

What one α does depends on the length of v against that of g, and that on the model, its width and the form of L_v. A
budget δ is a part of the features' own size. At each step

    drift = Σ |z − z(φ)| / Σ |z(φ)|                over image tokens and channels
    q     = drift / δ, held within 1/4 and 4
    s     ← s · q^RATE, held within LIMITS; 1 at first
    α     = align · s · q · ‖g‖ / ‖v‖              over all parameters: α v is align · s · q times as long as g

The factor q is a spring, which damps what s alone would let swing; s finds the pull at which the drift stays near δ.
Neither changes if the losses, or z, are multiplied by a constant. This is ours, not the paper's.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from torch_mdgd.checks import require_number
from torch_mdgd.kernels import Tensors, ratio
from torch_mdgd.rules.base import Rule, Weights, lone

PULL = "drift_pull"
SPAN = 4.0
RATE = 0.05
# A pull ten times as long as g has nothing left to learn with; beyond it, only noise would grow.
LIMITS = (1e-3, 10.0)


class DriftBudget(Rule):
    """Another rule, whose α follows from a budget; its ``align`` is in units of ‖g‖ / ‖v‖, and is where α begins.

    Nothing here waits for the device, and processes that are told the same drift hold the same s.

    Args:
        rule: has a weight ``align``, such as ``MDGD(regularize=0)`` or ``Project()``.
        budget: δ > 0, how far visual features may move, as a part of their size.

    Raises:
        TypeError: ``rule`` is no rule.
        ValueError: ``budget`` is not a finite number above 0; ``rule`` has no ``align``, or one of 0.
    """

    def __init__(self, rule: Rule, budget: float) -> None:
        if not isinstance(rule, Rule):
            raise TypeError(f"DriftBudget: rule must be a Rule such as Project(), got {rule!r}")
        if not rule.weights.get("align"):
            raise ValueError(f"DriftBudget multiplies align: pass a rule with an align above 0, not {rule}")
        self.rule = rule
        self.budget = require_number("DriftBudget: budget", budget, above=0)
        self.weights, self.corrects = rule.weights, rule.corrects
        self.pull = torch.ones((), dtype=torch.float64)
        # Of the step under way: Σ |z − z(φ)| and Σ |z(φ)|.
        self._sums: Tensor | None = None
        self._recorded: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"DriftBudget({self.rule}, {self.budget:g})"

    def saw_features(self, z: Tensor, z_ref: Tensor, average: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Take in how far the features of one micro-batch have moved."""
        sums = average(drift_sums(z, z_ref))
        self._sums = sums if self._sums is None else self._sums + sums
        self.rule.saw_features(z, z_ref, average)

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """The rule's, with α of this step.

        Raises:
            RuntimeError: there is a visual gradient, and nobody has told how far its features have moved.
        """
        strength = torch.zeros_like(products[0, 0, 0])
        if products.shape[-1] > 1:
            if self._sums is None:
                raise RuntimeError("DriftBudget needs the drift: call rule.saw_features(z, z_ref) in each step")
            strength = self._strength(ratio(*self._sums.to(products.device).unbind()), products)
        align = w["align"] * strength
        self._recorded["align"] = align[0]
        return self.rule.coefficients(products, {**w, "align": align}, masked)

    def _strength(self, drift: Tensor, products: Tensor) -> Tensor:
        """What multiplies ``align``.

        A drift of exactly 0, which is where training begins, says nothing about α and leaves s alone; so do NaN and
        Inf, which a gradient scaler may skip.
        """
        s, one = self.pull.to(products.device), torch.ones_like(products[0, 0, 0])
        says = drift.isfinite() & (drift > 0)
        q = torch.where(says, drift / self.budget, one).clamp(1 / SPAN, SPAN)
        # A new tensor: state dicts hold the old one.
        self.pull = s = (s * q**RATE).clamp(*LIMITS)
        self._recorded["visual_drift"] = drift
        total = products.sum(0)
        return s * q * ratio(total[0, 0], total[1, 1]).sqrt()

    def forget(self) -> None:
        """Forget what was seen for the step under way."""
        self._sums = None
        self.rule.forget()

    def state(self) -> dict[str, Tensor | Sequence[Tensor]]:
        """S, and the rule's own."""
        return {PULL: self.pull, **self.rule.state()}

    def load_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """The opposite of :meth:`state`."""
        pull = lone(found, PULL)
        self.pull = torch.ones((), dtype=torch.float64) if pull is None else pull.clone()
        self.rule.load_state(found, parameters)

    def diagnostics(self) -> dict[str, Tensor]:
        """``align``, which is α of the first parameter, and ``visual_drift``."""
        return {**self.rule.diagnostics(), **self._recorded}

    def attach(self, parameters: Sequence[Tensor], masked: bool) -> None:
        """Begin anew: another optimizer, such as that of the next task, has not drifted yet."""
        self.rule.attach(parameters, masked)
        self.pull = torch.ones((), dtype=torch.float64)
        self._sums, self._recorded = None, {}

    # The rest is the rule's: see :class:`Rule`.

    def extend(self, parameters: Sequence[Tensor]) -> None:
        """The rule's."""
        self.rule.extend(parameters)

    def needs(self, w: Weights, masked: bool) -> tuple[str, ...]:
        """The rule's."""
        return self.rule.needs(w, masked)

    def drift(self, products: Tensor) -> Tensor:
        """The rule's."""
        return self.rule.drift(products)

    def correct_(self, parameters: Tensors, before: Tensors, visual: Tensors | None, w: Weights) -> None:
        """The rule's."""
        self.rule.correct_(parameters, before, visual, w)

    def observe(self, images: Tensor) -> AbstractContextManager[None]:
        """The rule's."""
        return self.rule.observe(images)

    def sum_over(self, groups: Sequence[Any]) -> None:
        """The rule's."""
        self.rule.sum_over(groups)

    def check_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """The rule's."""
        self.rule.check_state(found, parameters)


def drift_sums(z: Tensor, z_ref: Tensor) -> Tensor:
    """Σ |z − z_ref| and Σ |z_ref|: float64, shape (2,). They add up over micro-batches and processes.

    Args:
        z: features, shape (tokens, hidden).
        z_ref: those of the same tokens at the reference.
    """
    reference = z_ref.detach().float()
    distances = (z.detach().float() - reference).abs()
    return torch.stack([distances.sum(dtype=torch.float64), reference.abs().sum(dtype=torch.float64)])

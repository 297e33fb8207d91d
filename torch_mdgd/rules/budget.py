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

import torch
from torch import Tensor

from torch_mdgd.checks import require_number, require_whole
from torch_mdgd.kernels import Tensors, ratio
from torch_mdgd.rules.around import Around
from torch_mdgd.rules.base import Rule, Weights, as_count, count_of, lone

PULL, STRENGTH, RATIO, AGE = "drift_pull", "drift_strength", "drift_ratio", "drift_age"
SPAN = 4.0
RATE = 0.05
# A pull ten times as long as g has nothing left to learn with; beyond it, only noise would grow.
LIMITS = (1e-3, 10.0)


class DriftBudget(Around):
    """Another rule, whose α follows from a budget; its ``align`` is in units of ‖g‖ / ‖v‖, and is where α begins.

    Nothing here waits for the device, and processes that are told the same drift hold the same s.

    Args:
        rule: has a weight ``align``, such as ``MDGD(regularize=0)`` or ``Project()``.
        budget: δ > 0, how far visual features may move, as a part of their size.
        measure_every: after how many steps ‖g‖ / ‖v‖ is measured. Where the rule allows one backward pass for both
            losses, the steps between take it, with the last ratio, and s and q of the step before. With 1, g and v are
            taken apart at every step.

    Raises:
        TypeError: ``rule`` is no rule.
        ValueError: an argument is out of range, naming it; ``rule`` has no ``align``, or one of 0.
    """

    def __init__(self, rule: Rule, budget: float, measure_every: int = 1) -> None:
        super().__init__(rule)
        if not rule.weights.get("align"):
            raise ValueError(f"DriftBudget multiplies align: pass a rule with an align above 0, not {rule}")
        self.budget = require_number("DriftBudget: budget", budget, above=0)
        self.measure_every = require_whole("DriftBudget: measure_every", measure_every)
        self._begin()
        # Of the step under way: Σ |z − z(φ)| and Σ |z(φ)|.
        self._sums: Tensor | None = None
        self._recorded: dict[str, Tensor] = {}

    def _begin(self) -> None:
        self.pull = torch.ones((), dtype=torch.float64, device="cpu")
        # s · q · ‖g‖ / ‖v‖ of the last step, and ‖g‖ / ‖v‖ of the last that measured it; how many steps ago it did.
        self.strength = torch.zeros((), dtype=torch.float64, device="cpu")
        self.ratio = torch.zeros((), dtype=torch.float64, device="cpu")
        self.age = 0

    def __repr__(self) -> str:
        return f"DriftBudget({self.rule}, {self.budget:g})"

    def saw_features(self, z: Tensor, z_ref: Tensor, average: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Take in how far the features of one micro-batch have moved."""
        sums = average(drift_sums(z, z_ref))
        self._sums = sums if self._sums is None else self._sums + sums
        super().saw_features(z, z_ref, average)

    def joint(self, w: Weights, masked: bool) -> float | None:
        """The rule's α times the last strength; None at steps that measure. It waits for the device."""
        strength = float(self.strength)
        if self.measure_every == 1 or self.age % self.measure_every == 0 or not 0 < strength < float("inf"):
            return None
        return self.rule.joint({**w, "align": w["align"] * strength}, masked)

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """The rule's, with α of this step.

        Raises:
            RuntimeError: there is a visual gradient, and nobody has told how far its features have moved.
        """
        measured = products.shape[-1] > 1
        if measured and self._sums is None:
            # A step without pictures takes all gradients too if it chooses a mask.
            if bool(products[:, 1, 1].any()):
                raise RuntimeError("DriftBudget needs the drift: call rule.saw_features(z, z_ref) in each step")
            measured = False
        if measured:
            total = products.sum(0)
            self.ratio = ratio(total[0, 0], total[1, 1]).sqrt()
        if self._sums is not None:
            self.age = 1 if measured else self.age + 1
            self.strength = self._strength(ratio(*self._sums.to(products.device).unbind()), products)
            self._recorded["align"] = w["align"][0] * self.strength
        return self.rule.coefficients(products, {**w, "align": w["align"] * self.strength.to(products.device)}, masked)

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
        return s * q * self.ratio.to(products.device)

    def forget(self) -> None:
        """Forget what was seen for the step under way."""
        self._sums = None
        super().forget()

    def state(self) -> dict[str, Tensor | Sequence[Tensor]]:
        """The pull s and the inner rule's state; between measurements the ratio and the strength too."""
        own = {PULL: self.pull}
        if self.measure_every > 1:
            own |= {STRENGTH: self.strength, RATIO: self.ratio, AGE: as_count(self.age)}
        return {**own, **super().state()}

    def load_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """The opposite of :meth:`state`."""
        self._begin()
        for name, attribute in ((PULL, "pull"), (STRENGTH, "strength"), (RATIO, "ratio")):
            value = lone(found, name)
            if value is not None:
                setattr(self, attribute, value.clone())
        self.age = count_of(found, AGE)
        super().load_state(found, parameters)

    def diagnostics(self) -> dict[str, Tensor]:
        """``align``, which is α of the first parameter, and ``visual_drift``."""
        return {**super().diagnostics(), **self._recorded}


def drift_sums(z: Tensor, z_ref: Tensor) -> Tensor:
    """Σ |z − z_ref| and Σ |z_ref|: float64, shape (2,). They add up over micro-batches and processes.

    Args:
        z: features, shape (tokens, hidden).
        z_ref: those of the same tokens at the reference.
    """
    reference = z_ref.detach().float()
    distances = (z.detach().float() - reference).abs()
    return torch.stack([distances.sum(dtype=torch.float64), reference.abs().sum(dtype=torch.float64)])

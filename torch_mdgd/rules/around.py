"""A rule around a rule: every hook is the inner rule's, unless a subclass says more."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from torch_mdgd.kernels import Tensors
from torch_mdgd.rules.base import KINDS, Rule, Weights, task_alone


class Plain(Rule):
    """d = g: what a rule that only adds to plain fine-tuning is around."""

    measures_one = False

    def needs(self, w: Weights, masked: bool) -> tuple[str, ...]:
        """The task gradient."""
        return KINDS[:1]

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """(1, 0, ...)."""
        return task_alone(products)


class Around(Rule):
    """The base of rules around a rule.

    Args:
        rule: the inner rule.
        own: weights of the outer one.

    Raises:
        TypeError: ``rule`` is no rule.
        ValueError: both have a weight of one name.
    """

    def __init__(self, rule: Rule, own: Mapping[str, float] | None = None) -> None:
        name = type(self).__name__
        if not isinstance(rule, Rule):
            raise TypeError(f"{name}: rule must be a Rule such as MDGD(regularize=0), got {rule!r}")
        twice = rule.weights.keys() & (own or {}).keys()
        if twice:
            raise ValueError(f"{name} and {rule} both have a weight {min(twice)!r}")
        self.rule = rule
        self.weights = {**rule.weights, **(own or {})}
        self.corrects, self.measures_one = rule.corrects, rule.measures_one

    # Each hook as in Rule.

    def attach(self, parameters: Sequence[Tensor], masked: bool) -> None:  # noqa: D102
        super().attach(parameters, masked)
        self.rule.attach(parameters, masked)

    def extend(self, parameters: Sequence[Tensor]) -> None:  # noqa: D102
        self.rule.extend(parameters)

    def needs(self, w: Weights, masked: bool) -> tuple[str, ...]:  # noqa: D102
        return self.rule.needs(w, masked)

    def joint(self, w: Weights, masked: bool) -> float | None:  # noqa: D102
        return self.rule.joint(w, masked)

    def drift(self, products: Tensor) -> Tensor:  # noqa: D102
        return self.rule.drift(products)

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:  # noqa: D102
        return self.rule.coefficients(products, w, masked)

    def pull_(  # noqa: D102
        self,
        g: Tensors,
        parameters: Sequence[Tensor],
        difference: Callable[[int], Tensor],
        w: Weights,
        scale: float,
    ) -> None:
        self.rule.pull_(g, parameters, difference, w, scale)

    def correct_(self, parameters: Tensors, before: Tensors, visual: Tensors | None, w: Weights) -> None:  # noqa: D102
        self.rule.correct_(parameters, before, visual, w)

    def observe(  # noqa: D102
        self, images: Tensor, batch: Mapping[str, Any] | None = None
    ) -> AbstractContextManager[None]:
        return self.rule.observe(images, batch)

    def saw_features(  # noqa: D102
        self, z: Tensor, z_ref: Tensor, average: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        self.rule.saw_features(z, z_ref, average)

    def sum_over(self, groups: Sequence[Any]) -> None:  # noqa: D102
        self.rule.sum_over(groups)

    def forget(self) -> None:  # noqa: D102
        self.rule.forget()

    def state(self) -> dict[str, Tensor | Sequence[Tensor]]:  # noqa: D102
        return self.rule.state()

    def check_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:  # noqa: D102
        self.rule.check_state(found, parameters)

    def load_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:  # noqa: D102
        self.rule.load_state(found, parameters)

    def diagnostics(self) -> dict[str, Tensor]:  # noqa: D102
        return self.rule.diagnostics()

"""The ways of fine-tuning that are compared: each is AdamW at a learning rate, perhaps wrapped."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from torch_mdgd import MDGDOptimizer, TopK


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: what the command line calls it.
        label: what tables and figures call it.
        learning_rate: peak rate of AdamW; None trains nothing.
        wrap: arguments of `MDGDOptimizer`, None for the plain optimizer.
        fraction: of the trainable numbers that may move.
    """

    name: str
    label: str
    learning_rate: float | None
    wrap: dict[str, Any] | None = None
    fraction: float = 1.0

    def optimizer(self, parameters: list[torch.nn.Parameter]) -> Optimizer:
        """The optimizer over these parameters, wrapped at their present values."""
        assert self.learning_rate is not None
        base = AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        if self.wrap is None:
            return base
        mask = TopK(self.fraction) if self.fraction < 1 else None
        return MDGDOptimizer(base, mask=mask, compact=mask is not None, **self.wrap)

    def with_settings(self, learning_rate: float, **wrap: Any) -> "Method":
        """The same method with another learning rate and other arguments of the wrapper."""
        return replace(self, learning_rate=learning_rate, wrap=None if self.wrap is None else self.wrap | wrap)


PRETRAINED = Method("zero-shot", "Pre-trained", None)
# Chosen by `python -m reproductions mini tune`, which sees validation examples and its own seeds alone: the best
# H(P, T) of each method's candidates. The first AdamW has the rate with the best target score, which is what one
# tunes for who does not measure forgetting; the second is the fair rival.
METHODS = {
    method.name: method
    for method in (
        PRETRAINED,
        Method("fine-tune", "AdamW", 2e-3),
        Method("fine-tune-low", "AdamW, lower rate", 5e-4),
        Method("mdgd", "MDGD", 2e-3, {"align": 10.0, "regularize": 1.0}),
        Method("mdgd-gm", "MDGD-GM, 10 %", 1e-2, {"align": 10.0}, fraction=0.1),
        Method("step", "decoupled step", 1e-3, {"update": "project", "space": "step", "restore": 0.05}),
    )
}

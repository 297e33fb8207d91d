"""What combine has made of a step, until the step is taken."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

NOT_FINITE = (
    "a gradient holds NaN or Inf at the step that chooses the mask; nothing was changed. zero_grad() and go on with "
    "another batch, or train under a gradient scaler, which skips such steps"
)
NOTHING_TO_CHOOSE_FROM = (
    "the task gradient is zero at the step that chooses the mask, as of a batch whose labels are all -100: every score "
    "would tie; nothing was changed. zero_grad() and go on with another batch"
)


def why_no_mask(products: Tensor) -> str | None:
    """Why the gradients of a step, of which these are the inner products, have nothing to choose a mask by; or None."""
    if not bool(products.isfinite().all()):
        return NOT_FINITE
    return None if bool(products[:, 0, 0].any()) else NOTHING_TO_CHOOSE_FROM


class Made:
    """d and v of the step that was combined, and what is known of the steps before.

    Attributes:
        d: what combine left in every ``.grad``; None before it, and once the step is taken.
        visual: v, for a rule that corrects the step.
        refused: why no mask could be chosen; the step raises it, unless a gradient scaler skips it.
        products: the last step's table of inner products, float64, shape (T, R, R); None where it was of g + αv.
        since: how many steps ago g and v were taken apart.
        began: whether a step was taken, or φ said to be right.
    """

    products: Tensor | None = None
    began = False
    since = math.inf

    def __init__(self) -> None:
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        # Gradients stay behind when parameters are copied.
        return {**vars(self), "d": None}

    def clear(self) -> None:
        """Forget what is of one step alone."""
        self.d: list[Tensor | None] | None = None
        self.visual: list[Tensor | None] | None = None
        self.refused: str | None = None

    def begin(self, products: Tensor | None) -> None:
        """Begin a step with its table of inner products; None if g and v came as one."""
        self.clear()
        self.products = products
        self.since = 1 if products is not None and products.shape[-1] > 1 else self.since + 1

    def stands(self, parameters: Sequence[Tensor]) -> bool:
        """Whether a d that combine left is in some ``.grad`` still."""
        return self.d is not None and any(
            x is not None and x is p.grad for x, p in zip(self.d, parameters, strict=True)
        )

    def replaced(self, parameters: Sequence[Tensor]) -> bool:
        """Whether other gradients are there than d, as when a gradient scaler has skipped the step that it was for."""
        return any(p.grad is not None for p in parameters) and not self.stands(parameters)

    def visual_for(self, parameters: Sequence[Tensor]) -> list[Tensor | None] | None:
        """This step's v; None if every ``.grad`` was replaced since combine, e.g. by ``model.zero_grad()``.

        A warning says so if other gradients are there.
        """
        if self.visual is None or self.d is None or self.stands(parameters):
            return self.visual
        if self.replaced(parameters):
            warnings.warn(
                "step: .grad was replaced since combine(), so this is a step of the wrapped optimizer alone; change "
                "gradients in place, and after a step that was skipped call zero_grad() of the MDGDOptimizer",
                stacklevel=4,
            )
        return None

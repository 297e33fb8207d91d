"""The other reading of (9): r in place of g."""

from torch import Tensor

from torch_mdgd.rules.base import KINDS, Rule, Weights, agreement, checked, task_alone


class Reference(Rule):
    """d = r + αv with r of (8), also under a mask; without gradients at φ there is no r, and d = g + αv.

    Args:
        align: α ≥ 0, the weight of the visual gradient v.

    Raises:
        ValueError: ``align`` is out of range.
    """

    def __init__(self, align: float = 1.0) -> None:
        self.weights = checked(Reference, align=align)

    def needs(self, w: Weights, masked: bool) -> tuple[str, ...]:
        """All four gradients."""
        return KINDS

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """(0, α, ⟨g̃, g̃₀⟩ / ⟨g̃₀, g̃₀⟩), or (1, α)."""
        out = task_alone(products)
        if products.shape[-1] > 1:
            out[:, 1] = w["align"]
        if products.shape[-1] == 3:
            out[:, 0] = 0
            out[:, 2] = agreement(products, self.drift(products))
        return out

"""The projection in place of the regularizer: no gradients at φ."""

from torch import Tensor

from torch_mdgd.rules.base import Rule, Weights, checked, task_alone


class Project(Rule):
    """d = g̃ + αv with g̃ of (6): the part of g along v is removed, and α v put in its place.

    It is another reading of (9), and ours.

    Args:
        align: α ≥ 0, the weight of the visual gradient v.

    Raises:
        ValueError: ``align`` is out of range.
    """

    measures_one = False

    def __init__(self, align: float = 1.0) -> None:
        self.weights = checked(Project, align=align)

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """(1, α − ⟨g, v⟩ / ⟨v, v⟩)."""
        out = task_alone(products)
        if products.shape[-1] > 1:
            out[:, 1] = w["align"]
            out[:, 1] -= self.drift(products)
        return out

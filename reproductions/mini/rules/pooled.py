"""All parameters as one vector: another rule, whose inner products are sums over all of them."""

from torch import Tensor

from torch_mdgd.rules.around import Around
from torch_mdgd.rules.base import Weights


class Global(Around):
    """A rule whose ⟨x, y⟩ is Σ_t ⟨x_t, y_t⟩ over all parameters t, in (6), (7) and (8) alike.

    Args:
        rule: one that combines gradients, such as ``MDGD()``.
    """

    def drift(self, products: Tensor) -> Tensor:
        """The rule's, of the sums."""
        return self.rule.drift(_pooled(products))

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """The rule's, of the sums."""
        return self.rule.coefficients(_pooled(products), w, masked)


def _pooled(products: Tensor) -> Tensor:
    """The sum of all rows, in place of each."""
    return products.sum(0, keepdim=True).expand_as(products)

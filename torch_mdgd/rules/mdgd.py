"""The published update, equations (6)–(11) of MDGD, in the paper's order and letters.

Wu et al., Findings of EMNLP 2025, arXiv 2502.11740. The published text has lost its formulas; these forms are a
reconstruction from the words around each equation number.

    g, v      gradients of the task loss and of the visual alignment loss at the current weights θ
    g₀, v₀    the same two at the reference weights φ

    g̃  = g  − (⟨g, v⟩   / ⟨v, v⟩)   v          (6)
    g̃₀ = g₀ − (⟨g₀, v₀⟩ / ⟨v₀, v₀⟩) v₀         (7)
    r  = (⟨g̃, g̃₀⟩ / ⟨g̃₀, g̃₀⟩) g̃₀               (8)
    d  = g + α v + β r                          (9)
    M  = the largest s = g̃ ⊙ g̃₀                (10), chosen by :class:`torch_mdgd.masks.TopK`
    d  = M ⊙ (g + α v)                          (11)

Inner products are of each parameter by itself. A projection on a zero vector removes nothing: at the first step
θ = φ, so v = v₀ = 0 and g̃ = g.
"""

from torch import Tensor

from torch_mdgd.rules.base import KINDS, Rule, Weights, agreement, checked, task_alone


class MDGD(Rule):
    """d = g + αv + βr (9); under a mask d = M ⊙ (g + αv) (11).

    Args:
        align: α ≥ 0, the weight of the visual gradient v.
        regularize: β ≥ 0, the weight of r. With 0 no gradients at φ are needed: d = g + αv.

    Raises:
        ValueError: an argument is out of range, naming it.
    """

    def __init__(self, align: float = 1.0, regularize: float = 1.0) -> None:
        self.weights = checked(MDGD, align=align, regularize=regularize)

    def needs(self, w: Weights, masked: bool) -> tuple[str, ...]:
        """All four gradients for r; under a mask, and with β = 0, those at θ alone."""
        return KINDS if not masked and bool(w["regularize"].any()) else KINDS[:2]

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """(1, α), or (1, α, β ⟨g̃, g̃₀⟩ / ⟨g̃₀, g̃₀⟩)."""
        out = task_alone(products)
        if products.shape[-1] > 1:
            out[:, 1] = w["align"]
        if products.shape[-1] == 3 and not masked:
            out[:, 2] = w["regularize"] * agreement(products, self.drift(products))
        return out

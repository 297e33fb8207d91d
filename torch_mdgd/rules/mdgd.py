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

from collections.abc import Mapping, Sequence

from torch import Tensor

from torch_mdgd.checks import require_whole
from torch_mdgd.kernels import Tensors
from torch_mdgd.rules.base import KINDS, Rule, Weights, agreement, as_count, checked, count_of, task_alone

AGE = "lazy_age"


class MDGD(Rule):
    """d = g + αv + βr (9); under a mask d = M ⊙ (g + αv) (11).

    With β = 0, or under a mask, d = g + αv is the gradient of L + αL_v, and takes one backward pass.

    Args:
        align: α ≥ 0, the weight of the visual gradient v.
        regularize: β ≥ 0, the weight of r. With 0 no gradients at φ are needed: d = g + αv.
        every: k ≥ 1: v is taken at one step of k, weighted k-fold ("lazy αv"). The steps between are plain
            fine-tuning's. Only with β = 0. This is ours, not the paper's.

    Raises:
        ValueError: an argument is out of range, naming it; ``every`` above 1 with ``regularize`` above 0.
    """

    measures_one = False

    def __init__(self, align: float = 1.0, regularize: float = 1.0, every: int = 1) -> None:
        self.weights = checked(MDGD, align=align, regularize=regularize)
        self.every = require_whole("MDGD: every", every)
        if every > 1 and regularize:
            raise ValueError("MDGD: every > 1 leaves v out of most steps, which r needs: pass regularize=0")
        # How many steps were combined.
        self.age = 0

    @property
    def _takes_v(self) -> bool:
        # The last of each k steps: at the very first v is zero.
        return self.age % self.every == self.every - 1

    def needs(self, w: Weights, masked: bool) -> tuple[str, ...]:
        """All four gradients for r; under a mask, and with β = 0, those at θ alone; g between the steps that take v."""
        if not masked and bool(w["regularize"].any()):
            return KINDS
        return KINDS[:2] if self._takes_v else KINDS[:1]

    def joint(self, w: Weights, masked: bool) -> float | None:
        """α, k-fold, if it is one for all parameters and there is no r."""
        align = w["align"]
        if not self._takes_v or not len(align) or bool((align != align[0]).any()):
            return None
        return float(align[0]) * self.every if masked or not bool(w["regularize"].any()) else None

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """(1, α), or (1, α, β ⟨g̃, g̃₀⟩ / ⟨g̃₀, g̃₀⟩)."""
        out = task_alone(products)
        if products.shape[-1] > 1:
            out[:, 1] = w["align"] * (self.every if self._takes_v else 0)
        if products.shape[-1] == 3 and not masked:
            out[:, 2] = w["regularize"] * agreement(products, self.drift(products))
        self.age += 1
        return out

    def state(self) -> dict[str, Tensor | Sequence[Tensor]]:
        """How many steps were combined, if v is not taken at each."""
        return {AGE: as_count(self.age % self.every)} if self.every > 1 else {}

    def load_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """The opposite of :meth:`state`."""
        self.age = count_of(found, AGE)

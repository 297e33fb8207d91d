"""The largest weights: a baseline that any chosen mask has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torch_mdgd import kernels
from torch_mdgd.checks import require_share
from torch_mdgd.masks.base import Mask, ScoreInputs, kept


@dataclass(frozen=True)
class Magnitude(Mask):
    """The fraction of elements that are largest in absolute value when the optimizer is built.

    Args:
        fraction: in (0, 1]; counted as in :class:`~torch_mdgd.masks.TopK`.

    Raises:
        ValueError: ``fraction`` is out of range.
    """

    fraction: float = 0.10

    def __post_init__(self) -> None:
        require_share("Magnitude: fraction", self.fraction)

    def choose(self, parameters: Sequence[Tensor], gradients: ScoreInputs | None) -> list[Tensor]:
        """The mask of these parameters."""
        return kernels.top_k_masks([p.detach().abs() for p in parameters], kept(self.fraction, parameters))

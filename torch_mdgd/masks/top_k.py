"""The mask of MDGD-GM, equation (10) of MDGD (arXiv 2502.11740): where the gradients at θ and at φ agree most."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_mdgd import kernels
from torch_mdgd.checks import require_share, require_whole
from torch_mdgd.masks.base import Mask, ScoreInputs, kept
from torch_mdgd.parallel.dtensor import is_sharded


@dataclass(frozen=True)
class TopK(Mask):
    """The fraction ρ of elements with the largest similarity s = g̃ ⊙ g̃₀ (10), over all trained parameters together.

    Exactly max(1, round(ρ n)) of n elements; ties go to the lowest index in parameter order. While θ = φ the two
    gradients are equal, so a mask chosen once, at the start, is the top ρ by |g|.

    Args:
        fraction: ρ in (0, 1].
        refresh: choose anew every so many steps; None keeps the first choice. Under an optimizer with second moments
            a mask that changes often does harm: an element that was rarely chosen jumps when it is.

    Raises:
        ValueError: an argument is out of range, naming it.
    """

    fraction: float = 0.10
    refresh: int | None = None
    scored = True

    def __post_init__(self) -> None:
        require_share("TopK: fraction", self.fraction)
        if self.refresh is not None:
            require_whole("TopK: refresh", self.refresh)

    def choose(self, parameters: Sequence[Tensor], gradients: ScoreInputs | None) -> list[Tensor]:
        """The mask of these gradients."""
        assert gradients is not None
        # Of a parameter without any there is a mask too; of shards kernels take no None.
        g, v, g0 = (
            [
                torch.zeros_like(p) if x is None and (vector is gradients.g or is_sharded(p)) else x
                for x, p in zip(vector, parameters, strict=True)
            ]
            for vector in (gradients.g, gradients.v, gradients.g0_tilde)
        )
        masks = kernels.top_k_similarity_masks(g, v, g0, gradients.a, kept(self.fraction, parameters))
        return [mask for mask in masks if mask is not None]

"""Masks of MDGD-GM: which numbers may move (10).

The dense form: one bool per trainable number. Numbers outside the mask stay bit-identical, whatever the wrapped
optimizer does with its momentum or weight decay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torch_mdgd import kernels
from torch_mdgd.equations import Similarity, product


class Mask(Protocol):
    """Chooses which numbers may move from their scores s."""

    similarity: Similarity

    def choose(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Bool tensors of the scores' shapes."""


@dataclass(frozen=True)
class TopK:
    """The fraction ρ of all trainable numbers with the largest similarity, chosen once, at the first step.

    Exactly max(1, round(ρ n)) of the n numbers, ties to the lowest index in parameter order. At the first step the
    two gradients are equal, so the product is g²: the mask is then the top ρ by |g|.

    Args:
        fraction: ρ in (0, 1].
        similarity: s as a function of g~ and g~0 of one parameter (float64); :func:`product` as published,
            :func:`sign_agreement`, or any callable.

    Raises:
        ValueError: ``fraction`` is outside (0, 1].
    """

    fraction: float = 0.10
    similarity: Similarity = product

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"TopK: fraction must lie in (0, 1], got {self.fraction}")

    def choose(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The mask of these scores.

        Raises:
            ValueError: a score is NaN, naming the parameter's position.
        """
        for i, s in enumerate(scores):
            if s.isnan().any():
                raise ValueError(f"the similarity of parameter {i} holds NaN: no mask can be chosen from it")
        return kernels.top_k_masks(scores, max(1, round(self.fraction * sum(s.numel() for s in scores))))


@torch.no_grad()
def restore_outside_(parameters: Sequence[Tensor], before: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Give every number outside its mask the value it had before, bit for bit."""
    for p, x, mask in zip(parameters, before, masks, strict=True):
        p.copy_(torch.where(mask, p, x))

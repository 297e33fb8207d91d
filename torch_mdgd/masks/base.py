"""A mask: which elements of the trained parameters may move.

It is chosen when the optimizer is built, or from the gradients of a step. Elements outside it stay bit-identical,
whatever the wrapped optimizer does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_mdgd.kernels import Tensors
from torch_mdgd.parallel import dtensor


@dataclass(frozen=True)
class ScoreInputs:
    """What a mask may be chosen from, of T trained parameters: gradients of their shapes, None for a missing one.

    Args:
        g: the task gradient.
        v: the visual gradient.
        g0_tilde: g̃₀ of (7), the task gradient at φ without its part along v₀.
        a: ⟨g, v⟩ / ⟨v, v⟩ of each parameter, float64, shape (T,).
    """

    g: Tensors
    v: Tensors
    g0_tilde: Tensors
    a: Tensor


class Mask:
    """The base of all masks.

    Attributes:
        scored: whether it is chosen from the gradients of a step. If not, it is chosen when the optimizer is built.
        refresh: after how many steps it is chosen anew; None for never.
    """

    scored: bool = False
    refresh: int | None = None

    def choose(self, parameters: Sequence[Tensor], gradients: ScoreInputs | None) -> list[Tensor]:
        """Choose the mask; called when the optimizer is built, or at a step if ``scored``.

        Args:
            parameters: the T trained parameters.
            gradients: of the step, without NaN or Inf; None unless ``scored``.

        Returns:
            T bool tensors of the parameters' shapes, true where an element may move.
        """
        raise NotImplementedError


def kept(fraction: float, parameters: Sequence[Tensor]) -> int:
    """How many of n elements a fraction keeps: max(1, round(fraction · n)); a ValueError if there is none."""
    n = sum(p.numel() for p in parameters)
    if not n:
        raise ValueError(
            "a mask has nothing to choose from: no parameter is trained, or those that are have no element"
        )
    return max(1, round(fraction * n))


@torch.no_grad()
def restore_outside_(parameters: Sequence[Tensor], before: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Give every element outside its mask the value it had before, bit for bit."""
    parts = (dtensor.local([x.detach() for x in xs]) for xs in (parameters, before, masks))
    for p, x, mask in zip(*parts, strict=True):
        torch.where(mask, p, x, out=p)

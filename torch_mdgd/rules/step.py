"""Step space: take the visual drift out of the move that the wrapped optimizer made, not out of its input.

g̃ ⟂ v says nothing about what an optimizer with per-element scaling, momentum or weight decay then does. Here any
optimizer steps on g itself, and its actual move Δ = θ_after − θ_before is corrected:

    Δ' = Δ − (max(0, ⟨Δ, v⟩) / ⟨v, v⟩) v          only what raises the visual loss to first order is removed
    Δ'' = Δ' − a ‖Δ‖ v / ‖v‖                       a restoring move, decoupled as AdamW decouples weight decay

This form is ours, not the paper's. One relative: Adam-NSCL (CVPR 2021) projects Adam's step on the null space of the
layers' inputs.
"""

import torch
from torch import Tensor

from torch_mdgd import kernels
from torch_mdgd.kernels import Tensors, ratio
from torch_mdgd.rules.base import Rule, Weights, checked, task_alone


class StepProject(Rule):
    """The wrapped optimizer gets g, and its move loses what raises the visual loss.

    Args:
        restore: a ≥ 0, the length of the restoring move relative to the move's.

    Raises:
        ValueError: ``restore`` is out of range.
    """

    corrects = True
    measures_one = False

    def __init__(self, restore: float = 0.0) -> None:
        self.weights = checked(StepProject, restore=restore)

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """(1, 0): the wrapped optimizer gets g."""
        return task_alone(products)

    def correct_(self, parameters: Tensors, before: Tensors, visual: Tensors | None, w: Weights) -> None:
        """Δ → Δ''. Without a visual gradient the move stays as it is."""
        if visual is not None:
            moves = moves_(parameters, before)
            products = kernels.inner_products([moves, visual], [moves, visual])
            dd, dv, vv = products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]
            remove = ratio(dv.clamp(min=0), vv) + w["restore"].to(dd.device) * ratio(dd.sqrt(), vv.sqrt())
            subtract_(parameters, visual, remove)


def moves_(parameters: Tensors, before: Tensors) -> list[Tensor | None]:
    """Δ of each parameter, written over its value before the step."""
    pairs = zip(parameters, before, strict=True)
    return [None if p is None or x is None else torch.sub(p, x, out=x) for p, x in pairs]


def subtract_(parameters: Tensors, x: Tensors, a: Tensor) -> None:
    """θ − a x, in place, for T scalars a.

    The correction is subtracted from where the optimizer arrived. So a move with nothing to remove, or an element
    outside a mask, stays bit-identical; only −0 may become 0.
    """
    touched = [p if y is not None else None for p, y in zip(parameters, x, strict=True)]
    kernels.combine_(touched, [parameters, x], torch.stack([torch.ones_like(a), -a], dim=1))

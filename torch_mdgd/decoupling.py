"""Step space: take the visual drift out of the move that the wrapped optimizer made, not out of its input.

g~ ⟂ v says nothing about what an optimizer with per-number scaling, momentum or weight decay then does. Here any
optimizer steps on g itself, and its actual move Δ = θ_after − θ_before is decoupled:

    Δ' = Δ − (max(0, ⟨Δ, v⟩) / ⟨v, v⟩) v          only what raises the visual loss to first order is removed
    Δ'' = Δ' − a ‖Δ‖ v / ‖v‖                       a restoring move, decoupled as AdamW decouples weight decay

This form is ours, not the paper's. One relative: Adam-NSCL (CVPR 2021) projects Adam's step on the null space of
the layers' inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_mdgd import sharded
from torch_mdgd.equations import pool, ratio
from torch_mdgd.kernels import Role


def decouple_move(delta: Tensor, v: Tensor, restore: float = 0.0) -> Tensor:
    """Δ'' of one flat float64 move: the oracle.

    Args:
        delta: the move Δ, shape (n,).
        v: the visual gradient where the move began, shape (n,).
        restore: a ≥ 0, the length of the restoring move relative to the move's.
    """
    out = delta - ratio((delta @ v).clamp(min=0), v @ v) * v
    return out - restore * ratio(delta.norm(), v.norm()) * v


def decouple_moves_(
    parameters: Sequence[Tensor], before: Sequence[Tensor], v: Role, together: Tensor, restore: Tensor
) -> None:
    """Decouple the moves of a list of parameters, in place.

    The correction is subtracted from where the optimizer arrived, so that a move with nothing to remove, or a number
    outside a mask, stays bit-identical; only −0 may become 0.

    Args:
        parameters: T parameters after the step.
        before: their values before it; overwritten with the moves.
        v: visual gradients there, None where there is none.
        together: bool, shape (T,): parameters of scope "global".
        restore: a, shape (T,), float64.
    """
    moves = list(before)
    for p, x in zip(parameters, moves, strict=True):
        torch.sub(p, x, out=x)
    products = pool(sharded.inner_products([moves, v], [moves, v]), together)
    dd, dv, vv = products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]
    correction = ratio(dv.clamp(min=0), vv) + restore.to(dd.device) * ratio(dd.sqrt(), vv.sqrt())
    touched = [p if x is not None else None for p, x in zip(parameters, v, strict=True)]
    sharded.combine_(touched, [parameters, v], torch.stack([torch.ones_like(correction), -correction], dim=1))

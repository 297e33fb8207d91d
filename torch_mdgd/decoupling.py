"""Step space: take the visual drift out of the move that the wrapped optimizer made, not out of its input.

g~ ⟂ v says nothing about what an optimizer with per-number scaling, momentum or weight decay then does. Here any
optimizer steps on g itself, and its actual move Δ = θ_after − θ_before is decoupled:

    Δ' = Δ − (max(0, ⟨Δ, v⟩) / ⟨v, v⟩) v          only what raises the visual loss to first order is removed
    Δ'' = Δ' − a ‖Δ‖ v / ‖v‖                       a restoring move, decoupled as AdamW decouples weight decay

or, with a history of k > 1 visual gradients, of which Q is an orthonormal basis, by both signs:

    Δ' = Δ − Q Qᵀ Δ

The restoring move follows the projection, and no later one sees it: what they project is the wrapped optimizer's.

This form is ours, not the paper's. One relative: Adam-NSCL (CVPR 2021) projects Adam's step on the null space of
the layers' inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from torch_mdgd import sharded
from torch_mdgd.equations import pool, ratio
from torch_mdgd.kernels import Role
from torch_mdgd.settings import Group

Decouple: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
"""Is given the parameters after the wrapped optimizer's step and their values before it (its to overwrite), and
corrects the parameters in place. Of a compact storage they are the selected numbers, 1-D."""


# A direction of length 1 of which no more than this is not in the span of others.
DEPENDENT = 1e-4
# Of a Gram matrix with diagonal 1, against dependent directions; and how often its error is corrected.
RIDGE = 1e-9
ROUNDS = 4


class Decoupling(Protocol):
    """What step space takes out of the wrapped optimizer's moves, with all that it remembers for that."""

    def check_groups(self, groups: Sequence[Group]) -> None:
        """Raise a ValueError if settings of these groups are not for it, naming them."""

    def of_step(self, directions: Role | None, groups: Sequence[Group]) -> Decouple | None:
        """What to do to the moves of the step that is about to be made; None leaves them alone, without a snapshot.

        Args:
            directions: T visual gradients inside the mask, None where there is none; None for a step that combined
                none, or without a group in step space.
            groups: the parameter groups.
        """

    def begin(self) -> None:
        """A mask was chosen: what is remembered of other numbers is of no use."""

    def extend(self, group: Group) -> None:
        """A parameter group was added."""

    def save(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict with what is remembered in it; see :mod:`torch_mdgd.checkpoint`."""

    def check(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Raise a ValueError if :meth:`load` could not load this; nothing has been changed yet."""

    def load(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """The opposite of :meth:`save`, after all else was loaded; a state dict without it forgets."""


def decouple_move(delta: Tensor, v: Tensor, restore: float = 0.0) -> Tensor:
    """Δ'' of one flat float64 move: the oracle.

    Args:
        delta: the move Δ, shape (n,).
        v: the visual gradient where the move began, shape (n,).
        restore: a ≥ 0, the length of the restoring move relative to the move's.
    """
    out = delta - ratio((delta @ v).clamp(min=0), v @ v) * v
    return out - restore * ratio(delta.norm(), v.norm()) * v


def decouple_from_history(delta: Tensor, directions: Tensor, v: Tensor, restore: float = 0.0) -> Tensor:
    """Δ'' of one flat float64 move with a history: the oracle.

    Args:
        delta: the move Δ, shape (n,).
        directions: what is to be removed, of any lengths and perhaps dependent, shape (k, n).
        v: the visual gradient where the move began, shape (n,); one of the directions.
        restore: a ≥ 0, the length of the restoring move relative to the move's.
    """
    lengths = directions.norm(dim=1, keepdim=True)
    _, sigma, Q = torch.linalg.svd(ratio(directions, lengths.expand_as(directions)), full_matrices=False)
    Q = Q[sigma > DEPENDENT]
    out: Tensor = delta - Q.T @ (Q @ delta)
    return out - restore * ratio(delta.norm(), v.norm()) * v


def removal(table: Tensor) -> Tensor:
    """The projection of moves on spans, as coefficients: Σ_j c_j D_j + c_v v.

    v is taken last, for its products with the others are not exact: what is left of it beside them may be rounding.

    Args:
        table: inner products of D_1, ..., D_k, v and the move, shape (T, k + 2, k + 2), float64. The D_j may be zero or
            dependent; NaN and Inf of v and the move come through.

    Returns:
        shape (T, k + 1).
    """
    k = table.shape[-1] - 2
    lengths = table.diagonal(dim1=1, dim2=2)[:, :k].sqrt()
    scale = ratio(torch.ones_like(lengths), lengths)[..., None]
    gram, right = scale * table[:, :k, :k] * scale.mT, scale * table[:, :k, k:]
    # Not the eigenvalues, for which the host would wait. Each round takes a ridge's error to a higher power.
    lower, _ = torch.linalg.cholesky_ex(gram + RIDGE * torch.eye(k, dtype=gram.dtype, device=gram.device))
    x: Tensor = torch.zeros_like(right)
    for _ in range(ROUNDS):
        x = x + torch.cholesky_solve(right - gram @ x, lower)
    of_v, of_move = x.unbind(-1)
    vv = table[:, k, k] - (of_v * right[..., 0]).sum(1)
    vd = table[:, k, k + 1] - (of_v * right[..., 1]).sum(1)
    c_v = torch.where(vv <= DEPENDENT**2 * table[:, k, k], torch.zeros_like(vd), vd / vv)
    return torch.cat([scale[..., 0] * (of_move - c_v[:, None] * of_v), c_v[:, None]], 1)


def decouple_moves_(
    parameters: Sequence[Tensor], before: Sequence[Tensor], v: Role, together: Sequence[bool], restore: Tensor
) -> None:
    """Decouple the moves of a list of parameters, in place.

    The correction is subtracted from where the optimizer arrived, so that a move with nothing to remove, or a number
    outside a mask, stays bit-identical; only −0 may become 0.

    Args:
        parameters: T parameters after the step.
        before: their values before it; overwritten with the moves.
        v: visual gradients there, None where there is none.
        together: T times whether a parameter is of scope "global".
        restore: a, shape (T,), float64.
    """
    moves = list(before)
    for p, x in zip(parameters, moves, strict=True):
        torch.sub(p, x, out=x)
    products = pool(sharded.inner_products([moves, v], [moves, v]), torch.tensor(together))
    dd, dv, vv = products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]
    correction = ratio(dv.clamp(min=0), vv) + restore.to(dd.device) * ratio(dd.sqrt(), vv.sqrt())
    touched = [p if x is not None else None for p, x in zip(parameters, v, strict=True)]
    sharded.combine_(touched, [parameters, v], torch.stack([torch.ones_like(correction), -correction], dim=1))

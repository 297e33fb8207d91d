"""The small experiment's rules for one flat float64 vector each: slow, short, and what the tests compare with."""

import torch
from torch import Tensor

from tests.reference.equations import decouple, ratio, regularizer

# A direction of length 1 of which no more than this is not in the span of others.
DEPENDENT = 1e-4


def reference(g: Tensor, v: Tensor, g0: Tensor, v0: Tensor, align: float) -> Tensor:
    """D = r + α v."""
    return regularizer(decouple(g, v), decouple(g0, v0)) + align * v


def decouple_from_history(delta: Tensor, directions: Tensor, v: Tensor, restore: float = 0.0) -> Tensor:
    """Δ'' of one move with a history.

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

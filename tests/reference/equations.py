"""Equations (6)-(11) of MDGD for one flat float64 vector each, in the paper's order and letters."""

import torch
from torch import Tensor


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, and 0 where the denominator is 0. NaN stays NaN."""
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


def decouple(g: Tensor, v: Tensor) -> Tensor:
    """(6) g~ = g − (⟨g, v⟩ / ⟨v, v⟩) v; with g0 and v0 it is (7)."""
    return g - ratio(g @ v, v @ v) * v


def regularizer(g_tilde: Tensor, g0_tilde: Tensor) -> Tensor:
    """(8) r = (⟨g~, g~0⟩ / ⟨g~0, g~0⟩) g~0."""
    return ratio(g_tilde @ g0_tilde, g0_tilde @ g0_tilde) * g0_tilde


def mdgd(g: Tensor, v: Tensor, g0: Tensor, v0: Tensor, align: float, regularize: float) -> Tensor:
    """(9) d = g + α v + β r."""
    return g + align * v + regularize * regularizer(decouple(g, v), decouple(g0, v0))


def project(g: Tensor, v: Tensor, align: float) -> Tensor:
    """D = g~ + α v, the reading of (9) without r."""
    return decouple(g, v) + align * v


def similarity(g: Tensor, v: Tensor, g0: Tensor, v0: Tensor) -> Tensor:
    """(10) s = g~ ⊙ g~0."""
    return decouple(g, v) * decouple(g0, v0)


def mdgd_gm(g: Tensor, v: Tensor, mask: Tensor, align: float) -> Tensor:
    """(11) d = M ⊙ (g + α v)."""
    return mask * (g + align * v)


def step_project(delta: Tensor, v: Tensor, restore: float = 0.0) -> Tensor:
    """Δ'' of one move Δ: without what raises the visual loss, and with a restoring move of length a ‖Δ‖."""
    out = delta - ratio((delta @ v).clamp(min=0), v @ v) * v
    return out - restore * ratio(delta.norm(), v.norm()) * v


def protect_inputs(delta: Tensor, basis: Tensor) -> Tensor:
    """ΔW (I − Q Qᵀ) for ΔW of shape (outputs, width) and Q of shape (width, k)."""
    return delta - delta @ basis @ basis.T

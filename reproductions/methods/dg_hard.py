"""DG-Hard (Abro and Tahir 2026, arXiv 2605.20296): of each weight's change only what stands out of noise is kept.

Of ΔW = UΣVᵀ, with m rows and n columns and β = min(m, n) / max(m, n), singular values up to τ become 0:

    τ = scale · ω(β) · median(Σ) / μ(β),   ω(β)² = 2(β + 1) + 8β / (β + 1 + √(β² + 14β + 1))

ω is the optimal hard threshold for known noise (Gavish and Donoho 2014, arXiv 1305.5870), and μ(β) the median singular
value of noise alone, by the law of Marchenko and Pastur, so that median(Σ) / μ estimates the noise. No data.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from reproductions.methods import base
from reproductions.shared.fields import limited

FEWEST_NUMBERS = 1024
"""Smaller matrices are left as they are, as in the published code; so are vectors."""
_GRID = 20_001


def threshold_coefficient(beta: float) -> float:
    """ω(β), for β in (0, 1]; 4 / √3 for a square matrix."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))


@lru_cache(maxsize=64)
def median_of_noise(beta: float) -> float:
    """μ(β): the median singular value of a matrix of independent noise, of variance 1 / max(m, n)."""
    # λ = 1 + β + 2 √β cos t takes the roots at both ends of the density away.
    t = np.linspace(0, math.pi, _GRID)
    values = 1 + beta + 2 * math.sqrt(beta) * np.cos(t)
    with np.errstate(invalid="ignore", divide="ignore"):
        density = np.where(values > 1e-12, 2 * np.sin(t) ** 2 / (math.pi * values), 2 / math.pi)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(float(np.interp(0.5, below / below[-1], values)))


def shrunk(change: Tensor, scale: float = 1.0) -> Tensor:
    """The change of a weight, (m, n), without its singular values up to τ; computed in float32 or better."""
    m, n = change.shape
    beta = min(m, n) / max(m, n)
    U, S, V = torch.linalg.svd(change.to(torch.promote_types(change.dtype, torch.float32)), full_matrices=False)
    tau = scale * threshold_coefficient(beta) * S.median() / median_of_noise(beta)
    return (U * torch.where(tau < S, S, torch.zeros_like(S)) @ V).to(change.dtype)


@dataclass(frozen=True)
class ShrinkSettings(base.Settings):
    """Settings of DG-Hard.

    Attributes:
        scale: of the threshold; 1 is published.
    """

    scale: float = limited(1.0, least=0)


class DGHard(base.Method):
    """θ = φ + shrunk(θ − φ), on the result of plain fine-tuning; costs nothing."""

    name = "dg-hard"
    title = "DG-Hard"
    in_paper = False
    begins_with = "fine-tune"
    Settings = ShrinkSettings

    @torch.no_grad()
    def finish(self, work: base.Work, module: nn.Module) -> None:
        """Shrink the changes of the matrices that were trained."""
        before = work.pretrained
        for name, p in module.named_parameters():
            if p.requires_grad and p.dim() == 2 and p.numel() >= FEWEST_NUMBERS:
                start = before[name].to(p.device, torch.float32)
                p.copy_(start + shrunk(p.float() - start, self.settings.scale))

"""L2-SP: a pull towards the weights from which fine-tuning began, alike for all numbers (arXiv 1802.01483)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reproductions.methods import base
from reproductions.shared.fields import limited


class PullTowards:
    """(weight / 2) Σ (θ − φ)², with φ the values now: L2-SP (Li et al. 2018, arXiv 1802.01483).

    Args:
        parameters: θ; φ is a copy, of as many bytes.
        weight: ≥ 0.

    Raises:
        ValueError: ``weight`` is negative.
    """

    def __init__(self, parameters: Iterable[Tensor], weight: float) -> None:
        self.parameters = list(parameters)
        self.reference = [p.detach().clone() for p in self.parameters]
        self.weight = require_weight("PullTowards", weight)

    def __call__(self) -> Tensor:
        """The penalty, with its graph: float32 scalar."""
        pairs = zip(self.parameters, self.reference, strict=True)
        return self.weight / 2 * total((p - x).float().square().sum() for p, x in pairs)


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of scalars."""
    return torch.stack(list(terms)).sum()


def require_weight(name: str, weight: float) -> float:
    """The weight, unless it is negative."""
    if not weight >= 0:
        raise ValueError(f"{name}: weight must be at least 0, got {weight}")
    return weight


@dataclass(frozen=True)
class PullSettings(base.Settings):
    """Settings of L2-SP.

    Attributes:
        weight: of the penalty.
    """

    weight: float = limited(1e-2, least=0)


class L2SP(base.Method):
    """(weight / 2) Σ (θ − φ)²."""

    name = "l2-sp"
    title = "L2-SP"
    in_paper = False
    keeps = 4
    Settings = PullSettings

    def penalty(self, work: base.Work, module: nn.Module) -> base.Penalty:
        """The pull, with φ the values now."""
        return PullTowards(base.trained_parameters(module), self.settings.weight)

"""L2-SP and EWC: a pull towards the published weights, alike for all numbers or by what each one matters."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from reproductions.methods.penalties import ElasticWeights, PullTowards, diagonal_fisher
from reproductions.paper.fields import limited
from reproductions.paper.methods import base


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
    Settings = PullSettings

    def penalty(self, work: base.Work, module: nn.Module) -> base.Penalty:
        """The pull, with φ the values now."""
        return PullTowards(trained(module), self.settings.weight)


@dataclass(frozen=True)
class ElasticSettings(base.Settings):
    """Settings of EWC.

    Attributes:
        weight: of the penalty; F is divided by its mean, since it falls with the number of parameters, so that the
            weight is L2-SP's.
        samples: of what was learned before, for the Fisher information.
    """

    weight: float = limited(1e-2, least=0)
    samples: int = limited(128, least=1)


class EWC(base.Method):
    """(weight / 2) Σ F (θ − φ)², with F from training examples of pre-trained tasks, 1 on average."""

    name = "ewc"
    title = "EWC"
    in_paper = False
    Settings = ElasticSettings

    def penalty(self, work: base.Work, module: nn.Module) -> base.Penalty:
        """The pull, with φ the values now."""

        def loss(batch: Any) -> Tensor:
            found: Tensor = module(**batch).loss
            return found

        parameters = trained(module)
        fisher = diagonal_fisher(parameters, work.memory_batches(self.settings.samples), loss)
        mean = sum(f.sum() for f in fisher) / sum(f.numel() for f in fisher)
        for f in fisher:
            f /= mean
        return ElasticWeights(parameters, fisher, self.settings.weight)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """What is trained of a module."""
    return [p for p in module.parameters() if p.requires_grad]

"""EWC: a pull towards the weights from which fine-tuning began, by what each number matters (arXiv 1612.00796)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from reproductions.methods import base
from reproductions.methods.l2_sp import require_weight, total
from reproductions.shared.fields import limited

Batch = TypeVar("Batch")


class ElasticWeights:
    """(weight / 2) Σ F (θ − φ)², with φ the values now: EWC (Kirkpatrick et al. 2017, arXiv 1612.00796).

    Args:
        parameters: θ; φ is a copy, of as many bytes.
        fisher: F, how much each number matters to what was learned before, of the parameters' shapes; see
            :func:`diagonal_fisher`.
        weight: ≥ 0.

    Raises:
        ValueError: ``weight`` is negative, or ``fisher`` does not fit.
    """

    def __init__(self, parameters: Iterable[Tensor], fisher: Sequence[Tensor], weight: float) -> None:
        self.parameters = list(parameters)
        self.reference = [p.detach().clone() for p in self.parameters]
        self.fisher = list(fisher)
        self.weight = require_weight("ElasticWeights", weight)
        if [p.shape for p in self.parameters] != [f.shape for f in self.fisher]:
            raise ValueError("ElasticWeights: fisher must have one tensor a parameter, of its shape")

    def __call__(self) -> Tensor:
        """The penalty, with its graph: float32 scalar."""
        triples = zip(self.parameters, self.reference, self.fisher, strict=True)
        return self.weight / 2 * total((f * (p - x).float().square()).sum() for p, x, f in triples)


def diagonal_fisher(
    parameters: Iterable[Tensor], batches: Iterable[Batch], loss: Callable[[Batch], Tensor]
) -> list[Tensor]:
    """Mean over batches of the squared gradient of the loss: the empirical Fisher information's diagonal.

    It is that of the batches' mean gradients; pass batches of one sample for the information of samples.

    Args:
        parameters: with ``requires_grad``; their ``.grad`` is left alone.
        batches: of what was learned before, with its labels.
        loss: the mean negative log-likelihood of a batch.

    Returns:
        float32 tensors of the parameters' shapes, ≥ 0; zero where a parameter does not influence the loss.

    Raises:
        ValueError: no batch.
    """
    parameters = list(parameters)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    count = 0
    for batch in batches:
        count += 1
        gradients = torch.autograd.grad(loss(batch), parameters, allow_unused=True)
        for held, g in zip(sums, gradients, strict=True):
            if g is not None:
                held.addcmul_(g.float(), g.float())
    if not count:
        raise ValueError("diagonal_fisher: batches is empty")
    return [held / count for held in sums]


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
    remembers = True
    keeps = 8
    Settings = ElasticSettings

    def penalty(self, work: base.Work, module: nn.Module) -> base.Penalty:
        """The pull, with φ the values now."""

        def loss(batch: Any) -> Tensor:
            found: Tensor = module(**batch).loss
            return found

        parameters = base.trained_parameters(module)
        fisher = diagonal_fisher(parameters, work.memory_batches(self.settings.samples), loss)
        mean = sum(f.sum() for f in fisher) / sum(f.numel() for f in fisher)
        for f in fisher:
            f /= mean
        return ElasticWeights(parameters, fisher, self.settings.weight)

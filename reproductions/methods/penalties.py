"""Penalties that are added to the task loss: a pull towards the weights from which fine-tuning began.

Each is an object over the trained parameters; its call returns the scalar at their present values.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


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
        self.weight = _require_weight("PullTowards", weight)

    def __call__(self) -> Tensor:
        """The penalty, with its graph: float32 scalar."""
        pairs = zip(self.parameters, self.reference, strict=True)
        return self.weight / 2 * _total((p - x).float().square().sum() for p, x in pairs)


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
        self.weight = _require_weight("ElasticWeights", weight)
        if [p.shape for p in self.parameters] != [f.shape for f in self.fisher]:
            raise ValueError("ElasticWeights: fisher must have one tensor a parameter, of its shape")

    def __call__(self) -> Tensor:
        """The penalty, with its graph: float32 scalar."""
        triples = zip(self.parameters, self.reference, self.fisher, strict=True)
        return self.weight / 2 * _total((f * (p - x).float().square()).sum() for p, x, f in triples)


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


def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _require_weight(name: str, weight: float) -> float:
    if not weight >= 0:
        raise ValueError(f"{name}: weight must be at least 0, got {weight}")
    return weight

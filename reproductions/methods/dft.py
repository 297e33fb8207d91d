"""DFT (Wu et al. 2025, arXiv 2508.05629): each token's loss times the probability that the model gives it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reproductions.methods import base
from reproductions.methods.kl import IGNORED, answer_logits


def probability_weighted(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over answer tokens of p · (−log p), the factor p without a gradient.

    Args:
        logits: (rows, tokens, vocabulary).
        labels: (rows, tokens), -100 where there is nothing to say.

    Returns:
        float32 scalar, with its graph.
    """
    wanted = labels[:, 1:][labels[:, 1:] != IGNORED]
    losses = cross_entropy(answer_logits(logits, labels).float(), wanted, reduction="none")
    return ((-losses.detach()).exp() * losses).mean()


class DFT(base.Method):
    """The weighted loss in place of the task loss."""

    name = "dft"
    title = "DFT"
    in_paper = False

    def divergence(self, work: base.Work, module: nn.Module) -> base.Divergence:
        """What has to be added to the task loss so that the weighted one is left."""

        def of(batch: base.Batch) -> Callable[[Any], Tensor]:
            return lambda output: probability_weighted(output.logits, batch["labels"]) - output.loss

        return of

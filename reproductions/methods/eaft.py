"""EAFT (arXiv 2601.02151): tokens of which the model is sure, and wrong perhaps, are learned less."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reproductions.methods import base
from reproductions.methods.kl import IGNORED, answer_logits
from reproductions.shared.fields import limited


def entropy_weighted(logits: Tensor, labels: Tensor, top: int = 20) -> Tensor:
    """Mean over answer tokens of H̃ · (−log p), with H̃ = H(top tokens) / ln(top), without a gradient.

    H is the entropy of the likeliest tokens' probabilities, normalised to 1.

    Args:
        logits: (rows, tokens, vocabulary).
        labels: (rows, tokens), -100 where there is nothing to say.
        top: of how many tokens; of all, if there are fewer.

    Returns:
        float32 scalar, with its graph.
    """
    said = answer_logits(logits, labels).float()
    wanted = labels[:, 1:][labels[:, 1:] != IGNORED]
    with torch.no_grad():
        logs = said.topk(min(top, said.shape[-1])).values.log_softmax(-1)
        weights = -(logs.exp() * logs).sum(-1) / math.log(top)
    return (weights * cross_entropy(said, wanted, reduction="none")).mean()


@dataclass(frozen=True)
class EntropySettings(base.Settings):
    """Settings of EAFT.

    Attributes:
        top: tokens that the entropy is of.
    """

    top: int = limited(20, least=2)


class EAFT(base.Method):
    """The weighted loss in place of the task loss."""

    name = "eaft"
    title = "EAFT"
    in_paper = False
    Settings = EntropySettings

    def divergence(self, work: base.Work, module: nn.Module) -> base.Divergence:
        """What has to be added to the task loss so that the weighted one is left."""

        def of(batch: base.Batch) -> Callable[[Any], Tensor]:
            return lambda output: entropy_weighted(output.logits, batch["labels"], self.settings.top) - output.loss

        return of

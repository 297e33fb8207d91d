"""KL: what the model says at answer tokens stays near what it said before (Li and Hoiem 2016, arXiv 1606.09282)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reproductions.methods import base
from reproductions.shared.fields import limited
from torch_mdgd.loss import Reference

IGNORED = -100


@dataclass(frozen=True)
class DivergenceSettings(base.Settings):
    """Settings of the divergence.

    Attributes:
        weight: of the loss.
    """

    weight: float = limited(1.0, least=0)


class Divergence:
    """weight · KL(p_φ ‖ p_θ), the mean over the answer tokens of a batch; φ are the parameters as they are now.

    Args:
        module: what is trained; adapters that begin as nothing are switched off for φ.
        weight: ≥ 0.
    """

    def __init__(self, module: nn.Module, weight: float) -> None:
        self.module, self.weight = module, weight
        self.reference = Reference(module)

    def __call__(self, batch: base.Batch) -> Callable[[Any], Tensor]:
        """Run the batch at φ.

        Returns:
            what makes the loss of the output at θ: float32 scalar, with its graph.
        """
        with self.reference(), torch.no_grad():
            before = self.log_probabilities(self.module(**batch).logits, batch["labels"])

        def loss(output: Any) -> Tensor:
            now = self.log_probabilities(output.logits, batch["labels"])
            return self.weight * (before.exp() * (before - now)).sum(-1).mean()

        return loss

    def log_probabilities(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of what may be said at each answer token: (answer tokens, vocabulary), float32."""
        return answer_logits(logits, labels).float().log_softmax(-1)


def answer_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Those that say an answer's token, (answer tokens, vocabulary), of (rows, tokens, vocabulary)."""
    return logits[:, :-1][labels[:, 1:] != IGNORED]


class KL(base.Method):
    """g of the task loss with the divergence added: one more forward pass."""

    name = "kl"
    title = "KL at answers"
    in_paper = False
    keeps = 4
    Settings = DivergenceSettings

    def divergence(self, work: base.Work, module: nn.Module) -> Divergence:
        """From the values now."""
        return Divergence(module, self.settings.weight)

"""Mask the Target (Xu et al. 2026, arXiv 2605.29498): a divergence that does not pull against what is learned.

At each answer token the right token is taken out of the probabilities before and now, and the rest is normalised:

    weight · KL(p̃_φ ‖ p̃_θ),   p̃(y) = p(y) / (1 − p(right)) for y ≠ right

The mean over answer tokens. The paper's text was not at hand beyond its abstract, which does not tell the direction of
the divergence: it is that of :mod:`~reproductions.methods.kl` here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reproductions.methods import base
from reproductions.methods.kl import IGNORED, Divergence, DivergenceSettings, answer_logits
from reproductions.methods.lora import LoraSettings
from reproductions.methods.lora_all import LoRAAll


class NonTargetDivergence(Divergence):
    """Of all tokens but the right one."""

    def log_probabilities(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(answer tokens, vocabulary − 1), float32."""
        said = answer_logits(logits, labels).float()
        right = labels[:, 1:][labels[:, 1:] != IGNORED]
        others = torch.ones_like(said, dtype=torch.bool).scatter_(1, right[:, None], False)
        return said[others].view(len(said), -1).log_softmax(-1)


@dataclass(frozen=True)
class MaskedSettings(LoraSettings, DivergenceSettings):
    """Settings of both."""


class MaskTheTarget(LoRAAll):
    """LoRA on all layers; φ is the model without its adapters."""

    name = "mask-the-target"
    title = "Mask the Target"
    keeps = 0
    Settings = MaskedSettings

    def divergence(self, work: base.Work, module: nn.Module) -> NonTargetDivergence:
        """From the values now."""
        return NonTargetDivergence(module, self.settings.weight)

"""WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): weights between the pre-trained and the fine-tuned ones."""

from dataclasses import dataclass

import torch
from torch import nn

from reproductions.methods import base
from reproductions.shared.fields import limited


@dataclass(frozen=True)
class MixSettings(base.Settings):
    """Settings of WiSE-FT.

    Attributes:
        share: λ, of the way from the pre-trained to the fine-tuned weights.
    """

    share: float = limited(0.5, least=0, most=1)


class WiseFT(base.Method):
    """θ = φ + λ (θ − φ), on the result of plain fine-tuning; costs nothing."""

    name = "wise-ft"
    title = "WiSE-FT"
    in_paper = False
    begins_with = "fine-tune"
    Settings = MixSettings

    @torch.no_grad()
    def finish(self, work: base.Work, module: nn.Module) -> None:
        """Mix the weights that were trained."""
        before = work.pretrained
        for name, p in module.named_parameters():
            if p.requires_grad:
                start = before[name].to(p.device, torch.float32)
                p.copy_(torch.lerp(start, p.float(), self.settings.share))

"""DARE (Yu et al. 2023, arXiv 2311.03099): most of what was learned is dropped at random, the rest is scaled up."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reproductions.methods import base
from reproductions.shared.fields import limited


def dropped(change: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """m ⊙ δ / (1 − p), with m ~ Bernoulli(1 − p): the mean over m is δ.

    Args:
        change: δ, of any shape.
        share: p, in [0, 1).
        generator: draws m, on the change's device.
    """
    kept = torch.rand(change.shape, generator=generator, device=change.device) >= share
    return torch.where(kept, change / (1 - share), torch.zeros_like(change))


@dataclass(frozen=True)
class DropSettings(base.Settings):
    """Settings of DARE.

    Attributes:
        share: p, of the numbers that go back to their pre-trained values.
        seed: draws them.
    """

    share: float = limited(0.9, least=0, most=0.9999)
    seed: int = limited(0, least=0)


class DARE(base.Method):
    """θ = φ + m ⊙ (θ − φ) / (1 − p), on the result of plain fine-tuning; costs nothing."""

    name = "dare"
    title = "DARE"
    in_paper = False
    begins_with = "fine-tune"
    Settings = DropSettings

    @torch.no_grad()
    def finish(self, work: base.Work, module: nn.Module) -> None:
        """Drop, of the weights that were trained."""
        before = work.pretrained
        generator: torch.Generator | None = None
        for name, p in module.named_parameters():
            if p.requires_grad:
                generator = generator or torch.Generator(p.device).manual_seed(self.settings.seed)
                start = before[name].to(p.device, torch.float32)
                p.copy_(start + dropped(p.float() - start, self.settings.share, generator))

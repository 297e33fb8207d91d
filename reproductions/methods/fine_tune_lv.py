"""Fine-tune + L_v: the alignment loss (5) as a plain second loss, without any projection."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from reproductions.methods import base
from reproductions.shared.fields import limited
from torch_mdgd import rules


@dataclass(frozen=True)
class AlignSettings(base.Settings):
    """Settings of the second loss.

    Attributes:
        align: α, its weight.
        every: k: v is taken at one step of k, k-fold.
    """

    align: float = limited(1.0, least=0)
    every: int = limited(1, least=1)


class FineTuneLv(base.Method):
    """d = g + αv."""

    name = "fine-tune-lv"
    title = "Fine-tune + L_v"
    in_paper = False
    Settings: ClassVar[type] = AlignSettings

    def rule(self, model: nn.Module) -> rules.Rule:
        """The published update without r: nothing of it is left but the two gradients' sum."""
        return rules.MDGD(self.settings.align, regularize=0.0, every=self.settings.every)

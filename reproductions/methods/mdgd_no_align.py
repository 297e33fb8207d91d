"""MDGD without visual alignment: the ablation of Tables 1 and 2."""

from dataclasses import dataclass

from torch import nn

from reproductions.methods import base
from reproductions.shared.fields import limited
from torch_mdgd import rules


@dataclass(frozen=True)
class NoAlignSettings(base.Settings):
    """Settings without α.

    Attributes:
        regularize: β.
    """

    regularize: float = limited(1.0, least=0)


class MDGDNoAlign(base.Method):
    """d = g + βr."""

    name = "mdgd-no-align"
    title = "w/o visual align"
    Settings = NoAlignSettings

    def rule(self, model: nn.Module) -> rules.Rule:
        """The published update without the visual gradient."""
        return rules.MDGD(0.0, self.settings.regularize)

"""MDGD: the paper's method."""

from dataclasses import dataclass

from torch import nn

from reproductions.methods import base
from reproductions.shared.fields import limited
from torch_mdgd import rules


@dataclass(frozen=True)
class MDGDSettings(base.Settings):
    """Settings of MDGD; the paper gives no values.

    Attributes:
        align: α, weight of the visual gradient.
        regularize: β, weight of the projection on the reference's gradient.
    """

    align: float = limited(1.0, least=0)
    regularize: float = limited(1.0, least=0)


class MDGD(base.Method):
    """d = g + αv + βr (9)."""

    name = "mdgd"
    title = "MDGD"
    Settings = MDGDSettings

    def rule(self, model: nn.Module) -> rules.Rule:
        """The published update."""
        return rules.MDGD(self.settings.align, self.settings.regularize)

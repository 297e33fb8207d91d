"""g̃ + αv: the projection (6) in place of the regularizer, without gradients at the reference."""

from dataclasses import dataclass

from torch import nn

from reproductions.methods import base
from reproductions.shared.fields import limited
from torch_mdgd import rules


@dataclass(frozen=True)
class ProjectSettings(base.Settings):
    """Settings of the projection.

    Attributes:
        align: α, weight of the visual gradient.
    """

    align: float = limited(1.0, least=0)


class Project(base.Method):
    """Another reading of (9), and ours."""

    name = "project"
    title = "g̃ + αv"
    in_paper = False
    Settings = ProjectSettings

    def rule(self, model: nn.Module) -> rules.Rule:
        """The projection."""
        return rules.Project(self.settings.align)

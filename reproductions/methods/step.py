"""Step space: the optimizer's move loses what raises the visual loss."""

from dataclasses import dataclass

from torch import nn

from reproductions.methods import base
from reproductions.shared.fields import limited
from torch_mdgd import rules


@dataclass(frozen=True)
class StepSettings(base.Settings):
    """Settings in step space.

    Attributes:
        restore: length of a move back towards old features, relative to the step's.
    """

    restore: float = limited(0.0, least=0)


class Step(base.Method):
    """By the visual gradient of the step; ours."""

    name = "step"
    title = "Decoupled step"
    in_paper = False
    Settings = StepSettings

    def rule(self, model: nn.Module) -> rules.Rule:
        """The correction of moves."""
        return rules.StepProject(self.settings.restore)

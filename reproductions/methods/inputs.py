"""Step space without a visual gradient: the move loses what changes layers' answers to image tokens."""

from dataclasses import dataclass

from torch import nn

from reproductions.methods import base
from reproductions.shared.fields import limited
from torch_mdgd import connector, rules


@dataclass(frozen=True)
class InputSettings(base.Settings):
    """Settings of the protection.

    Attributes:
        energy: share of each layer's visual inputs that is kept from change.
        parts: whose layers are protected: "all", or "connector" for its own alone.
        refresh: steps between two looks at the inputs' directions, which takes the cube of each layer's width.
    """

    energy: float = limited(0.9, least=0, most=1)
    parts: str = limited("all", choices=("all", "connector"))
    refresh: int = limited(10, least=1)


class Inputs(base.Method):
    """Of all layers, or of the connector's; ours."""

    name = "inputs"
    title = "Protected inputs"
    in_paper = False
    Settings = InputSettings

    def rule(self, model: nn.Module) -> rules.Rule:
        """The correction of moves."""
        s = self.settings
        parts = [connector(model)] if s.parts == "connector" else None
        return rules.ProtectInputs(model, s.energy, parts=parts, refresh=s.refresh)

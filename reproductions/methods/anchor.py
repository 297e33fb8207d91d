"""The anchor: layers' answers to the task's pictures under general questions stay where they were; ours."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from reproductions.methods import base
from reproductions.shared.fields import limited
from torch_mdgd import rules


@dataclass(frozen=True)
class AnchorSettings(base.Settings):
    """Settings of the anchor.

    Attributes:
        strength: λ.
        directions: of each layer's input that are held exactly.
        samples: pictures of the task, each under a general question, that tell which inputs matter; 0 for the prompts
            of the first steps in their place.
    """

    strength: float = limited(5.0, least=0)
    directions: int = limited(8, least=1)
    samples: int = limited(256, least=0)


class Anchored(base.Method):
    """d = g + λ (W − W₀) C; one forward and one backward pass."""

    name = "anchor"
    title = "Anchor"
    in_paper = False
    Settings: ClassVar[type] = AnchorSettings

    def rule(self, model: nn.Module) -> rules.Rule:
        """The pull of each layer's weights."""
        return rules.Anchor(model, self.settings.strength, rank=self.settings.directions)

    def prepare_rule(self, rule: Any, work: base.Work) -> None:
        """Calibrate it, as soon as it knows its layers."""
        if self.settings.samples:
            rule.calibrate(work.prompt_batches(self.settings.samples))

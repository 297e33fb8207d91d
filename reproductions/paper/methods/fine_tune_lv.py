"""Fine-tune + L_v: the alignment loss (5) as a plain second loss, without any projection."""

from dataclasses import dataclass
from typing import Any

from reproductions.paper.fields import limited
from reproductions.paper.methods import base


@dataclass(frozen=True)
class AlignSettings(base.Settings):
    """Settings of the second loss.

    Attributes:
        align: α, its weight.
    """

    align: float = limited(1.0, least=0)


class FineTuneLv(base.Method):
    """d = g + αv."""

    name = "fine-tune-lv"
    title = "Fine-tune + L_v"
    in_paper = False
    Settings = AlignSettings

    def wrapper(self) -> dict[str, Any]:
        """The published update without r: nothing of it is left but the two gradients' sum."""
        return {"align": self.settings.align, "regularize": 0.0}

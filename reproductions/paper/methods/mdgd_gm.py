"""MDGD-GM: only the numbers whose two gradients agree most may move."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from reproductions.paper.fields import limited
from reproductions.paper.methods import base
from torch_mdgd import TopK


@dataclass(frozen=True)
class MaskSettings(base.Settings):
    """Settings of MDGD-GM.

    Attributes:
        align: α, weight of the visual gradient.
        ratio: ρ, share of the trained numbers that may move.
        warmup: steps whose gradients the mask is chosen from. Weights wait for it, so that v is zero and g̃ is g then:
            the choice goes by the task's gradient alone.
    """

    align: float = limited(1.0, least=0)
    ratio: float = limited(0.1, least=1e-9, most=1)
    warmup: int = limited(1, least=1)


class MDGDGM(base.Method):
    """d = M ⊙ (g + αv) (11), with optimizer state and reference for the mask's numbers alone."""

    name = "mdgd-gm"
    title = "MDGD-GM"
    Settings = MaskSettings

    def trained(self, module: nn.Module) -> int:
        """The mask's."""
        return max(1, round(self.settings.ratio * super().trained(module)))

    def wrapper(self) -> dict[str, Any]:
        """The published update under a mask."""
        mask = TopK(self.settings.ratio, warmup=self.settings.warmup)
        return {"align": self.settings.align, "mask": mask, "compact": True}

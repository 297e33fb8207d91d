"""MDGD-GM: only the numbers whose two gradients agree most may move."""

from dataclasses import dataclass

from torch import nn

from reproductions.methods import base
from reproductions.shared.fields import limited
from torch_mdgd import masks, rules

COMPACT_UP_TO = 0.7
"""A share ρ beyond which state that is kept for the mask alone takes more than whole state: 24 ρ + 4 bytes a number in
a step with AdamW, to 21."""


@dataclass(frozen=True)
class MaskSettings(base.Settings):
    """Settings of MDGD-GM.

    Attributes:
        align: α, weight of the visual gradient.
        ratio: ρ, share of the trained numbers that may move. They are chosen in the first step, when v is zero and g̃ is
            g: the choice goes by the task's gradient alone.
        compact: keep optimizer state and reference for the mask's numbers alone, up to a ratio of 0.7, beyond which
            that would take more memory; the update is the same.
    """

    align: float = limited(1.0, least=0)
    ratio: float = limited(0.1, least=1e-9, most=1)
    compact: bool = True


class MDGDGM(base.Method):
    """d = M ⊙ (g + αv) (11)."""

    name = "mdgd-gm"
    title = "MDGD-GM"
    Settings = MaskSettings

    def trained(self, module: nn.Module) -> int:
        """The mask's."""
        return max(1, round(self.settings.ratio * super().trained(module)))

    def rule(self, model: nn.Module) -> rules.Rule:
        """The published update, which is (11) under a mask."""
        return rules.MDGD(self.settings.align)

    def mask(self) -> masks.Mask:
        """Chosen once."""
        return masks.TopK(self.settings.ratio)

    @property
    def compact(self) -> bool:
        """As it is set, where it spares memory."""
        return bool(self.settings.compact) and self.settings.ratio <= COMPACT_UP_TO

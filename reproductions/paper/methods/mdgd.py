"""MDGD, and the same without visual alignment: the ablation of Tables 1 and 2."""

from dataclasses import dataclass
from typing import Any

from reproductions.paper.fields import limited
from reproductions.paper.methods import base


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

    def wrapper(self) -> dict[str, Any]:
        """The published update."""
        return {"align": self.settings.align, "regularize": self.settings.regularize}


@dataclass(frozen=True)
class NoAlignSettings(base.Settings):
    """Settings without α.

    Attributes:
        regularize: β.
    """

    regularize: float = limited(1.0, least=0)


class MDGDNoAlign(base.Method):
    """α = 0."""

    name = "mdgd-no-align"
    title = "w/o visual align"
    Settings = NoAlignSettings

    def wrapper(self) -> dict[str, Any]:
        """The published update without the visual gradient."""
        return {"align": 0.0, "regularize": self.settings.regularize}

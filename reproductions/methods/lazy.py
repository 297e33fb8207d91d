"""Lazy αv: the visual gradient at one step of k, weighted k-fold; ours."""

from dataclasses import dataclass

from reproductions.methods import fine_tune_lv
from reproductions.shared.fields import limited


@dataclass(frozen=True)
class LazySettings(fine_tune_lv.AlignSettings):
    """Settings of lazy αv.

    Attributes:
        every: k.
    """

    every: int = limited(8, least=1)


class Lazy(fine_tune_lv.FineTuneLv):
    """d = g at most steps, and g + k αv at one of k."""

    name = "lazy"
    title = "Lazy αv"
    Settings = LazySettings

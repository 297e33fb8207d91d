"""Replay: a share of every batch is of tasks that the model could answer before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reproductions.methods.replay import Replay as Replayed
from reproductions.paper.fields import limited
from reproductions.paper.methods import base


@dataclass(frozen=True)
class ReplaySettings(base.Settings):
    """Settings of replay.

    Attributes:
        share: of each step's examples that are old.
        seed: draws them.
    """

    share: float = limited(0.25, least=0, most=1)
    seed: int = limited(0, least=0)


class Replay(base.Method):
    """The upper bound where old data is at hand: training splits of the pre-trained tasks that have one."""

    name = "replay"
    title = "Replay"
    in_paper = False
    Settings = ReplaySettings

    def examples(self, work: base.Work, examples: Sequence[Any], batch: int) -> Sequence[Any]:
        """The target's examples with old ones among them."""
        return Mixed(examples, Replayed(work.memory(), self.settings.share), batch, self.settings.seed)


class Mixed(Sequence[Any]):
    """Target examples of which a share of each ``batch`` in a row is replaced; the order is shuffled afterwards."""

    def __init__(self, examples: Sequence[Any], replay: Replayed, batch: int, seed: int) -> None:
        self.examples, self.memory = examples, replay.memory
        rng = np.random.default_rng(seed)
        # Places instead of examples: pictures are read when they are needed.
        places = Replayed([~i for i in range(len(replay.memory))], replay.share)
        numbers = list(range(len(examples)))
        self.places = [
            i for start in range(0, len(numbers), batch) for i in places(numbers[start : start + batch], rng)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        place = self.places[index]
        return self.examples[place] if place >= 0 else self.memory[~place]

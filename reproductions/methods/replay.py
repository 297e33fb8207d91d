"""Replay: some examples of what was learned before in every batch, the upper bound where the old data is at hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from reproductions.methods import base
from reproductions.shared.fields import limited

Example = TypeVar("Example")


@dataclass(frozen=True)
class Replay(Generic[Example]):
    """Puts old examples in the place of new ones, so that batches keep their size.

    Args:
        memory: old examples.
        share: of each batch, in [0, 1].

    Raises:
        ValueError: ``share`` is out of range, or ``memory`` is empty.
    """

    memory: Sequence[Example]
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"Replay: share must lie in [0, 1], got {self.share}")
        if not len(self.memory):
            raise ValueError("Replay: memory holds no examples")

    def __call__(self, batch: Sequence[Example], rng: np.random.Generator) -> list[Example]:
        """The batch with its last round(share · size) examples replaced by different ones of the memory."""
        count = min(round(self.share * len(batch)), len(self.memory))
        chosen = rng.choice(len(self.memory), count, replace=False)
        return [*batch[: len(batch) - count], *(self.memory[i] for i in chosen)]


@dataclass(frozen=True)
class ReplaySettings(base.Settings):
    """Settings of replay.

    Attributes:
        share: of each step's examples that are old.
        seed: draws them.
    """

    share: float = limited(0.25, least=0, most=1)
    seed: int = limited(0, least=0)


class WithReplay(base.Method):
    """The upper bound where old data is at hand: training splits of the pre-trained tasks that have one."""

    name = "replay"
    title = "Replay"
    in_paper = False
    remembers = True
    Settings = ReplaySettings

    def examples(self, work: base.Work, examples: Sequence[Any], batch: int) -> Sequence[Any]:
        """The target's examples with old ones among them."""
        return Mixed(examples, Replay(work.memory(), self.settings.share), batch, self.settings.seed)


@dataclass(frozen=True)
class OnePercentSettings(ReplaySettings):
    """Settings of little replay."""

    share: float = limited(0.01, least=0, most=1)


@dataclass(frozen=True)
class FivePercentSettings(ReplaySettings):
    """Settings of some replay."""

    share: float = limited(0.05, least=0, most=1)


@dataclass(frozen=True)
class TenPercentSettings(ReplaySettings):
    """Settings of more replay."""

    share: float = limited(0.1, least=0, most=1)


class Replay1(WithReplay):
    """One example in a hundred, at least one in a step."""

    name = "replay-1"
    title = "Replay, 1 %"
    Settings = OnePercentSettings


class Replay5(WithReplay):
    """One in twenty."""

    name = "replay-5"
    title = "Replay, 5 %"
    Settings = FivePercentSettings


class Replay10(WithReplay):
    """One in ten."""

    name = "replay-10"
    title = "Replay, 10 %"
    Settings = TenPercentSettings


class Mixed(Sequence[Any]):
    """Target examples of which a share of each ``batch`` in a row is replaced; the order is shuffled afterwards."""

    def __init__(self, examples: Sequence[Any], replay: Replay, batch: int, seed: int) -> None:
        self.examples, self.memory = examples, replay.memory
        rng = np.random.default_rng(seed)
        # Places instead of examples: pictures are read when they are needed.
        places = Replay([~i for i in range(len(replay.memory))], replay.share)
        numbers = list(range(len(examples)))
        self.places = [
            i for start in range(0, len(numbers), batch) for i in places(numbers[start : start + batch], rng)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        place = self.places[index]
        return self.examples[place] if place >= 0 else self.memory[~place]

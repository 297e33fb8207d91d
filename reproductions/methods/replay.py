"""Replay: some examples of what was learned before in every batch, the upper bound where the old data is at hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

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

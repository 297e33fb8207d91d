"""Questions without a picture: what a language model knows from words alone, and may forget as well.

They are facts, so there is nothing to split: pre-training sees all of them, and a test asks for each once.
"""

from dataclasses import dataclass

import numpy as np

from reproductions.mini.world.pictures import KIND_OF, KINDS, LETTERS
from reproductions.mini.world.questions import NUMBERS, Turn


@dataclass(frozen=True)
class TextTask:
    """Facts, each a question with its answer, and every answer they have."""

    facts: tuple[Turn, ...]
    answers: tuple[str, ...]


def _sums() -> tuple[Turn, ...]:
    pairs = ((a, b) for a in range(10) for b in range(10 - a))
    return tuple((f"how many are {NUMBERS[a]} and {NUMBERS[b]} ?", NUMBERS[a + b]) for a, b in pairs)


def _series() -> tuple[Turn, ...]:
    triples = zip(LETTERS, LETTERS[1:], LETTERS[2:], strict=False)
    return tuple((f"{a} , {b} and which letter ?", c) for a, b, c in triples)


def _sorts() -> tuple[Turn, ...]:
    return tuple((f"what kind of thing is a {name} ?", kind) for name, kind in KIND_OF.items())


TEXT_TASKS: dict[str, TextTask] = {
    "sum": TextTask(_sums(), NUMBERS),
    "series": TextTask(_series(), LETTERS),
    "sort": TextTask(_sorts(), tuple(KINDS)),
}


def ask_fact(rng: np.random.Generator) -> Turn:
    """A fact of a task drawn at random."""
    task = TEXT_TASKS[str(rng.choice(list(TEXT_TASKS)))]
    return task.facts[int(rng.integers(len(task.facts)))]

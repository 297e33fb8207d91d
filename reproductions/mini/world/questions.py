"""Questions about scenes: seven pre-trained tasks, and the caption target.

Each function takes a scene and a random source and returns a question with its answer, or None when the scene does not
allow the question. The comment beside each names the benchmark of the paper that it stands for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reproductions.mini.world.pictures import COLOURS, KIND_OF, KINDS, KNOWN, LETTERS
from reproductions.mini.world.scenes import POSITIONS, Scene

Turn = tuple[str, str]
"""A question and its answer, as words separated by single spaces."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_QUESTION = "what digit is this ?"
CAPTION_QUESTION = "describe the image ."


def _pick_object(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    cell = int(rng.choice([i for i, name in enumerate(scene.cells) if name in scene.objects]))
    return POSITIONS[cell], scene.cells[cell]


def ask_object(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Which object stands at a position (after GQA)."""
    position, name = _pick_object(scene, rng)
    return f"what is at the {position} ?", name


def ask_kind(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Which kind of thing stands at a position (after GQA's attribute questions)."""
    position, name = _pick_object(scene, rng)
    return f"what kind of thing is at the {position} ?", KIND_OF[name]


def ask_existence(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Whether there is a letter, or an object at a position (after POPE): each half yes, half no.

    A full scene has neither a letter nor a free cell; asking it would give the answer away, so it is not asked.
    """
    if all(scene.cells) and scene.letter is None:
        return None
    if rng.random() < 0.5:
        return "is there a letter ?", "yes" if scene.letter else "no"
    occupied = [name in scene.objects for name in scene.cells]
    answer = bool(rng.random() < 0.5)
    cell = int(rng.choice([i for i in range(4) if occupied[i] == answer]))
    return f"is there a thing at the {POSITIONS[cell]} ?", "yes" if answer else "no"


def ask_letter(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Which letter is shown (after TextVQA)."""
    return ("what letter is shown ?", scene.letter) if scene.letter else None


def ask_choice(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """Which of four names is in the picture (after MMBench), answered by the name."""
    absent = [name for name in KNOWN if name not in scene.objects]
    answer = str(rng.choice(scene.objects))
    options = [str(name) for name in rng.permutation([answer, *rng.choice(absent, 3, replace=False)])]
    return f"which is shown , {' or '.join(options)} ?", answer


def ask_count(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """How many objects there are."""
    return "how many things are there ?", NUMBERS[len(scene.objects)]


def ask_colour(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """The colour of the background."""
    return "what colour is the background ?", scene.background


def caption(scene: Scene) -> Turn:
    """Describe the objects in the order of `POSITIONS` and the background (after Flickr30k)."""
    return CAPTION_QUESTION, " and ".join(f"a {name}" for name in scene.objects) + f" on {scene.background}"


@dataclass(frozen=True)
class Task:
    """A pre-trained task: how to ask, every answer it can have, and the accuracy of guessing in percent."""

    ask: Callable[[Scene, np.random.Generator], Turn | None]
    answers: tuple[str, ...]
    chance: float


PRETRAINED_TASKS: dict[str, Task] = {
    "object": Task(ask_object, KNOWN, 100 / len(KNOWN)),
    "kind": Task(ask_kind, tuple(KINDS), 100 / len(KINDS)),
    "existence": Task(ask_existence, ("yes", "no"), 50.0),
    "letter": Task(ask_letter, LETTERS, 100 / len(LETTERS)),
    "choice": Task(ask_choice, KNOWN, 25.0),
    "count": Task(ask_count, NUMBERS[1:5], 25.0),
    "colour": Task(ask_colour, tuple(COLOURS), 100 / len(COLOURS)),
}
TARGET_TASKS: tuple[str, ...] = ("digits", "caption", "tiles")

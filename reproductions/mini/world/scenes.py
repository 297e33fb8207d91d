"""Scenes: what stands in the four cells of a picture, and which split a scene belongs to."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from reproductions.mini.world.pictures import COLOURS, LETTERS

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

POSITIONS: tuple[str, ...] = ("top-left", "top-right", "bottom-left", "bottom-right")
"""One word each: from two words the decoder has to put a place together, which it learns far later or not at all."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows: per position the name of an object, a letter or "" (nothing), and the background colour."""

    cells: tuple[str, str, str, str]
    background: str

    @property
    def objects(self) -> tuple[str, ...]:
        """Names of the objects in the order of `POSITIONS`; letters are not objects."""
        return tuple(name for name in self.cells if name and name not in LETTERS)

    @property
    def letter(self) -> str | None:
        """The first letter shown, or None."""
        return next((name for name in self.cells if name in LETTERS), None)

    @property
    def split(self) -> Split:
        """The split that owns this scene: 70 % train, 15 % validation, 15 % test.

        It is a hash of the objects in order and the background, which is all that a caption says, so neither a picture
        nor a caption of one split can occur in another, whatever the seeds.
        """
        return split_of(" ".join((*self.objects, self.background)))


def split_of(key: str) -> Split:
    """The split that a hash of `key` falls into: 70 % train, 15 % validation, 15 % test."""
    share = hashlib.sha256(key.encode()).digest()[0] / 256
    return "train" if share < 0.70 else "validation" if share < 0.85 else "test"


def require_split(split: str) -> None:
    """Raise ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def draw_scene(rng: np.random.Generator, split: Split, names: Sequence[str], count: int) -> Scene:
    """Draw a scene of `split` with `count` (1 to 4) different objects from `names`.

    When a cell is left free it holds a letter in half of the scenes, so that "is there a letter ?" is balanced.
    """
    while True:
        things = [str(name) for name in rng.choice(names, count, replace=False)]
        if count < 4 and rng.random() < 0.5:
            things.append(str(rng.choice(LETTERS)))
        scene = _place(things, rng)
        if scene.split == split:
            return scene


def draw_crowd(rng: np.random.Generator, split: Split, names: Sequence[str]) -> Scene:
    """Draw a scene of `split` whose cells each hold, independently, something from `names` (85 %) or nothing."""
    while True:
        things = [str(name) if rng.random() < 0.85 else "" for name in rng.choice(names, 4)]
        scene = _place(things, rng)
        if scene.split == split:
            return scene


def _place(things: list[str], rng: np.random.Generator) -> Scene:
    cells = [things[i] if i < len(things) else "" for i in rng.permutation(4)]
    return Scene((cells[0], cells[1], cells[2], cells[3]), str(rng.choice(list(COLOURS))))

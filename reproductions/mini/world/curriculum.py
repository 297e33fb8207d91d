"""What pre-training shows at each step. Every batch is a function of the seed and the step alone.

So a data loader may draw them in another process, and a resumed run sees the batches that an unbroken one would.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from reproductions.mini.world.data import conversation_batch, pixel_values
from reproductions.mini.world.language import ask_fact
from reproductions.mini.world.pictures import COLOURS, KNOWN, LETTERS, SPARE, draw_picture
from reproductions.mini.world.questions import NUMBERS, PRETRAINED_TASKS, Turn
from reproductions.mini.world.scenes import POSITIONS, Scene, draw_crowd, draw_scene

DRAWINGS: tuple[str, ...] = ("", *KNOWN, *SPARE, *LETTERS)
"""Classes of a cell for the vision tower; the first is the empty cell."""

_COPIED = (*KNOWN, *SPARE, *COLOURS, *NUMBERS)
_COPYING_PERIOD = 8
_MOST_TURNS = 5
_FACTS = 3


@dataclass(frozen=True)
class VisionBatches(Dataset[dict[str, torch.Tensor]]):
    """Crowded scenes with what each cell holds: the vision tower's own pre-training, which stands in for CLIP's.

    Item `step`: `pixel_values` float32 (size, 3, 48, 48), `drawings` int64 (size, 4) and `background` int64 (size,).
    """

    seed: int
    steps: int
    size: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, 0, step])
        scenes = [draw_crowd(rng, "train", DRAWINGS[1:]) for _ in range(self.size)]
        colours = list(COLOURS)
        return {
            "pixel_values": pixel_values([draw_picture(scene.cells, scene.background, rng) for scene in scenes]),
            "drawings": torch.tensor([[DRAWINGS.index(name) for name in scene.cells] for scene in scenes]),
            "background": torch.tensor([colours.index(scene.background) for scene in scenes]),
        }


@dataclass(frozen=True)
class LanguageBatches(Dataset[dict[str, torch.Tensor]]):
    """Questions of all pre-trained tasks, up to five packed behind one picture; every eighth batch is copying text.

    The first half of the steps shows fuller scenes and asks for the object at each position: without that lead the
    decoder takes hundreds of steps to find out that image tokens have positions. Copying teaches the words of the
    target tasks without a picture; `facts` puts three of them
    beside it. Item `step` is a batch for `model(**batch)`.
    """

    tokenizer: PreTrainedTokenizerFast
    seed: int
    steps: int
    size: int
    facts: bool = False

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, 1, step])
        if step % _COPYING_PERIOD == _COPYING_PERIOD - 1:
            return conversation_batch([_spoken(rng, self.facts) for _ in range(self.size)], self.tokenizer)
        pictures: list[NDArray[np.uint8]] = []
        turns: list[list[Turn]] = []
        for _ in range(self.size):
            early = step < self.steps / 2
            count = int(rng.choice([2, 3, 4, 4])) if early else int(rng.integers(1, 5))
            scene = draw_scene(rng, "train", KNOWN, count)
            pictures.append(draw_picture(scene.cells, scene.background, rng))
            turns.append(_early_turns(scene, rng) if early else _late_turns(scene, rng))
        return conversation_batch(turns, self.tokenizer, pictures)


def _spoken(rng: np.random.Generator, facts: bool) -> list[Turn]:
    turns = [_copying(rng), *(ask_fact(rng) for _ in range(_FACTS if facts else 0))]
    return [turns[i] for i in rng.permutation(len(turns))] if facts else turns


def _copying(rng: np.random.Generator) -> Turn:
    words = " ".join(rng.choice(_COPIED, int(rng.integers(1, 4))))
    return f"repeat : {words}", words


def _early_turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    objects = [
        (f"what is at the {POSITIONS[cell]} ?", name) for cell, name in enumerate(scene.cells) if name in scene.objects
    ]
    others = [task for task in PRETRAINED_TASKS if task != "object"]
    turns = _asked(list(rng.permutation(others)[:3]), scene, rng) + objects
    return [turns[i] for i in rng.permutation(len(turns))][:_MOST_TURNS]


def _late_turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    return _asked(list(rng.permutation(list(PRETRAINED_TASKS))), scene, rng)[:_MOST_TURNS]


def _asked(tasks: list[str], scene: Scene, rng: np.random.Generator) -> list[Turn]:
    turns = (PRETRAINED_TASKS[task].ask(scene, rng) for task in tasks)
    return [turn for turn in turns if turn is not None]

"""Examples, their splits and their batches.

Splits are disjoint by construction: a scene's split is a hash of what it shows (`Scene.split`), and a scanned digit's a
fixed permutation of the 1,797 scans. Everything is a function of the arguments alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from reproductions.mini.world.language import TEXT_TASKS
from reproductions.mini.world.pictures import KNOWN, SPARE, draw_picture, handwritten_digits
from reproductions.mini.world.questions import DIGIT_QUESTION, NUMBERS, PRETRAINED_TASKS, TARGET_TASKS, Turn, caption
from reproductions.mini.world.scenes import SPLITS, Scene, Split, draw_scene, require_split
from reproductions.mini.world.text import answer_labels, conversation, encode, prompt
from reproductions.mini.world.tiles import COUNTS, Tiles, ask_tiles, draw_board, draw_tiles

NO_PICTURE: NDArray[np.uint8] = np.zeros((3, 0, 0), np.uint8)

Target = Literal["digits", "caption", "tiles"]

_DIGIT_ENDS = {"train": (0, 1200), "validation": (1200, 1497), "test": (1497, 1797)}
_DRAWN = {"train": 2000, "validation": 300, "test": 300}


@dataclass(frozen=True)
class Example:
    """A picture, uint8 (3, 48, 48), its question and answer, and its source: a scene, a board or the index of a scan.

    A question without a picture has `NO_PICTURE`; its source is its place among the facts.
    """

    picture: NDArray[np.uint8]
    question: str
    answer: str
    source: Scene | Tiles | int


@dataclass(frozen=True)
class TaskData(Dataset[Example]):
    """The examples of one task in one split.

    Attributes:
        task: name of the task.
        examples: in a fixed order.
        answers: every answer the task can have, when they are few and one word each; empty for captions.
    """

    task: str
    examples: Sequence[Example] = field(repr=False)
    answers: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "TaskData": ...
    def __getitem__(self, index: int | slice) -> "Example | TaskData":
        if isinstance(index, slice):
            return TaskData(self.task, self.examples[index], self.answers)
        return self.examples[index]


def pixel_values(pictures: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """Stack uint8 pictures to float32 (pictures, 3, 48, 48) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).float() / 127.5 - 1


def training_batch(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Batch for `model(**batch)`: `input_ids`, `attention_mask`, `labels` (-100 on prompts) and `pixel_values`."""
    turns = [[(example.question, example.answer)] for example in examples]
    return conversation_batch(turns, tokenizer, _pictures(examples))


def conversation_batch(
    turns: Sequence[Sequence[Turn]],
    tokenizer: PreTrainedTokenizerFast,
    pictures: Sequence[NDArray[np.uint8]] | None = None,
) -> dict[str, torch.Tensor]:
    """Like `training_batch`, for several questions behind one picture each, or (without `pictures`) behind none."""
    batch = encode(tokenizer, (conversation(asked, pictures is not None) for asked in turns))
    batch["labels"] = answer_labels(tokenizer, batch["input_ids"])
    if pictures is not None:
        batch["pixel_values"] = pixel_values(pictures)
    return batch


def prompt_batch(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Batch for `model.generate(**batch)`: prompts padded on the left, so that every row's next token is its answer."""
    pictures = _pictures(examples)
    batch = encode(tokenizer, (prompt(example.question, pictures is not None) for example in examples), "left")
    return batch if pictures is None else batch | {"pixel_values": pixel_values(pictures)}


def _pictures(examples: Sequence[Example]) -> list[NDArray[np.uint8]] | None:
    """Of every example, or None if no example has one.

    Raises:
        ValueError: some have one and some have none.
    """
    found = [example.picture for example in examples if example.picture is not NO_PICTURE]
    if found and len(found) < len(examples):
        raise ValueError(
            f"a batch has pictures for all of its examples or for none, got {len(found)} of {len(examples)}"
        )
    return found or None


def pretrained_task_data(task: str, split: Split, n: int, seed: int = 0) -> TaskData:
    """Draw `n` examples of a pre-trained task: scenes of one to four known objects.

    Raises:
        ValueError: `task` is not in `PRETRAINED_TASKS`, or `split` not in `SPLITS`.
    """
    if task not in PRETRAINED_TASKS:
        raise ValueError(f"task must be one of {', '.join(PRETRAINED_TASKS)}, got {task!r}")
    require_split(split)
    rng = np.random.default_rng([seed, SPLITS.index(split), list(PRETRAINED_TASKS).index(task)])
    examples: list[Example] = []
    while len(examples) < n:
        scene = draw_scene(rng, split, KNOWN, int(rng.integers(1, 5)))
        turn = PRETRAINED_TASKS[task].ask(scene, rng)
        if turn is not None:
            examples.append(Example(draw_picture(scene.cells, scene.background, rng), *turn, scene))
    return TaskData(task, examples, PRETRAINED_TASKS[task].answers)


def text_task_data(task: str) -> TaskData:
    """Every fact of a text-only task, in their order: they have no splits.

    Raises:
        ValueError: `task` is not in `TEXT_TASKS`.
    """
    if task not in TEXT_TASKS:
        raise ValueError(f"task must be one of {', '.join(TEXT_TASKS)}, got {task!r}")
    known = TEXT_TASKS[task]
    return TaskData(task, [Example(NO_PICTURE, *fact, i) for i, fact in enumerate(known.facts)], known.answers)


def target_data(name: Target, split: Split, n: int | None = None, seed: int = 0) -> TaskData:
    """Examples of a target task that pre-training never sees.

    Args:
        name: "digits" (which digit was written by hand), "caption" (two spare objects and the background, in words) or
            "tiles" (how many coloured shapes are of one colour).
        split: "train", "validation" or "test".
        n: how many; by default all scans of the split (1,200, 297, 300), or 2,000, 300 and 300 captions
            or boards.
        seed: draws the captions or boards, or the order of the scans.

    Raises:
        ValueError: an unknown `name` or `split`, or more scans asked for than the split has.
    """
    require_split(split)
    if name not in TARGET_TASKS:
        raise ValueError(f"name must be one of {', '.join(TARGET_TASKS)}, got {name!r}")
    return _drawn(name, split, n, seed)


# Every run of a study trains on the same examples, which take half a second to draw.
@lru_cache(maxsize=8)
def _drawn(name: Target, split: Split, n: int | None, seed: int) -> TaskData:
    rng = np.random.default_rng([seed, SPLITS.index(split), TARGET_TASKS.index(name)])
    return {"digits": _digits, "caption": _captions, "tiles": _tiles}[name](split, n, rng)


def _digits(split: Split, n: int | None, rng: np.random.Generator) -> TaskData:
    pictures, digits = handwritten_digits()
    start, end = _DIGIT_ENDS[split]
    n = end - start if n is None else n
    if n > end - start:
        raise ValueError(f"n is {n}, but the {split} split of digits has {end - start} scans")
    own = np.random.default_rng(0).permutation(len(digits))[start:end]
    examples = [
        Example(pictures[scan], DIGIT_QUESTION, NUMBERS[digits[scan]], int(scan)) for scan in rng.permutation(own)[:n]
    ]
    return TaskData("digits", examples, NUMBERS)


def _captions(split: Split, n: int | None, rng: np.random.Generator) -> TaskData:
    examples = []
    for _ in range(_DRAWN[split] if n is None else n):
        scene = draw_scene(rng, split, SPARE, 2)
        examples.append(Example(draw_picture(scene.cells, scene.background, rng), *caption(scene), scene))
    return TaskData("caption", examples, ())


def _tiles(split: Split, n: int | None, rng: np.random.Generator) -> TaskData:
    examples = []
    for _ in range(_DRAWN[split] if n is None else n):
        board = draw_board(rng, split)
        examples.append(Example(draw_tiles(board, rng), *ask_tiles(board), board))
    return TaskData("tiles", examples, COUNTS)

"""What an anchor is calibrated with: prompts about pictures of the task, without answers."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from reproductions.mini.world.data import TaskData, pixel_values, pretrained_task_data
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.mini.world.text import encode, prompt
from torch_mdgd.prompts import random_words

BATCHES, SIZE = 8, 32

Kind = Literal["random", "questions", "own"]


def prompts(
    kind: Kind,
    data: TaskData,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    batches: int = BATCHES,
    size: int = SIZE,
) -> list[dict[str, Tensor]]:
    """Batches for `model(**batch)`, without labels: pictures of the task under prompts of a kind.

    Args:
        kind: "random" words, which know of no question; "questions" of the pre-trained tasks, which know how these are
            asked, but show none of their pictures or answers; or the task's "own".
        data: training examples of the task.
        tokenizer: of the model.
        seed: of all draws.
        batches: how many.
        size: pictures in a batch.
    """
    asked = questions(kind, data, tokenizer, seed, batches, size)
    parts = [asked[start : start + size] for start in range(0, len(asked), size)]
    return [
        encode(tokenizer, (prompt(question) for _, question in part))
        | {"pixel_values": pixel_values([data.examples[i].picture for i, _ in part])}
        for part in parts
    ]


def questions(
    kind: Kind, data: TaskData, tokenizer: PreTrainedTokenizerFast, seed: int, batches: int = BATCHES, size: int = SIZE
) -> list[tuple[int, str]]:
    """The same as indices of examples, whose pictures are shown, and questions: batches × size of them."""
    rng = np.random.default_rng([seed, 7])
    places = rng.choice(len(data), (batches, size), replace=batches * size > len(data))
    asked = _questions(kind, data, tokenizer, places, seed)
    return list(zip(places.flatten().tolist(), asked, strict=True))


def _questions(
    kind: Kind, data: TaskData, tokenizer: PreTrainedTokenizerFast, places: NDArray[np.int64], seed: int
) -> list[str]:
    if kind == "random":
        return random_words(tokenizer, places.size, seed)
    if kind == "own":
        return [data.examples[int(i)].question for i in places.flat]
    each = -(-places.size // len(PRETRAINED_TASKS))
    drawn = (pretrained_task_data(task, "train", each, seed) for task in PRETRAINED_TASKS)
    found = [example.question for task in drawn for example in task.examples]
    return [found[i] for i in np.random.default_rng([seed, 8]).permutation(len(found))[: places.size]]

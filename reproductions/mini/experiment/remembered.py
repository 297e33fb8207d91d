"""What a method is told of the pre-trained tasks: old examples, or what the pre-trained model answers itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from reproductions.mini.experiment.methods import Method
from reproductions.mini.experiment.own_answers import own_answers
from reproductions.mini.experiment.scored_masks import Batches
from reproductions.mini.world.data import Example, TaskData, pretrained_task_data, training_batch
from reproductions.mini.world.questions import PRETRAINED_TASKS

SAMPLES = 128
"""Examples for LaLoRA's information and CorDA's covariances."""
# Of each pre-trained task; as many as there are digits to train on.
_REMEMBERED = 170


def memory(seed: int) -> list[Example]:
    """Training examples of every pre-trained task: what replay has kept."""
    tasks = (pretrained_task_data(task, "train", _REMEMBERED, seed) for task in PRETRAINED_TASKS)
    return [example for data in tasks for example in data.examples]


def answers(
    model: Any, tokenizer: PreTrainedTokenizerFast, data: TaskData, method: Method, seed: int
) -> Sequence[Example]:
    """What the model answers by itself before it is trained, if replay or a divergence of the method needs it."""
    wanted = (method.replay and method.memory == "answers") or (method.kl and method.kl_at == "questions")
    return own_answers(model, tokenizer, data, method.calibration, seed) if wanted else ()  # type: ignore[arg-type]


def samples(model: Any, tokenizer: PreTrainedTokenizerFast, data: TaskData, method: Method, seed: int) -> Batches:
    """Batches of one example, as the method's `memory` has it: old ones, or the model's own answers before training."""
    if method.memory == "old":
        known: Sequence[Example] = memory(seed)
    else:
        known = own_answers(model, tokenizer, data, method.calibration, seed)  # type: ignore[arg-type]
    drawn = np.random.default_rng([seed, 3]).choice(len(known), min(SAMPLES, len(known)), replace=False)
    return [training_batch([known[int(i)]], tokenizer) for i in drawn]

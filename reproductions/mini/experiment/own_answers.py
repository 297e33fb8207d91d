"""What the pre-trained model itself answers to questions about the task's pictures: a memory without old data."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from reproductions.mini.experiment.calibration import Kind, questions
from reproductions.mini.world.data import Example, TaskData, prompt_batch

BATCHES, SIZE = 16, 32


@torch.no_grad()
def own_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    data: TaskData,
    kind: Kind,
    seed: int,
    batches: int | None = None,
    size: int | None = None,
) -> list[Example]:
    """Pictures of the task, questions of a kind about them, and the model's greedy answers.

    Args:
        model: as it was pre-trained; its mode stays.
        tokenizer: of the model.
        data: training examples of the task; their answers are not looked at.
        kind: as of `calibration.prompts`.
        seed: of all draws.
        batches: how many; `BATCHES` by default.
        size: questions in a batch; `SIZE` by default.
    """
    batches, size = batches or BATCHES, size or SIZE
    training = model.training
    model.eval()
    asked = [
        Example(data.examples[i].picture, question, "", data.examples[i].source)
        for i, question in questions(kind, data, tokenizer, seed, batches, size)
    ]
    found = []
    for start in range(0, len(asked), size):
        chosen = asked[start : start + size]
        batch = prompt_batch(chosen, tokenizer)
        said = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(said, skip_special_tokens=True)
        found += [Example(e.picture, e.question, a, e.source) for e, a in zip(chosen, answers, strict=True)]
    model.train(training)
    return found

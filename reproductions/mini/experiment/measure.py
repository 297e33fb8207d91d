"""What is measured of a fine-tuned model: scores of every task, ranks and drift of its visual features."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from reproductions.mini.model.evaluate import evaluate, visual_features
from reproductions.mini.model.llava import load_checkpoint
from reproductions.mini.world.data import TaskData, pretrained_task_data, prompt_batch, target_data
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.mini.world.scenes import Split
from reproductions.shared.scores import average, harmonic
from torch_mdgd import effective_rank, visual_alignment_loss

_RANK_EXAMPLES = 200


def measured_tasks(target: str, split: Split, examples: int) -> dict[str, TaskData]:
    """The examples that measure: of every pre-trained task, then of the target; the same for every seed."""
    tasks = {task: pretrained_task_data(task, split, examples) for task in PRETRAINED_TASKS}
    return tasks | {target: target_data(target, split)[:examples]}  # type: ignore[arg-type]


def measure(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, target: str, split: Split, examples: int
) -> dict[str, Any]:
    """Scores of all pre-trained tasks and the target, their means, and the effective rank of the visual features."""
    tasks = measured_tasks(target, split, examples)
    answers = {task: evaluate(model, tokenizer, data) for task, data in tasks.items()}
    exact = {task: answer.exact for task, answer in answers.items()}
    kept = {task: exact[task] for task in PRETRAINED_TASKS}
    restricted = {task: answer.restricted for task, answer in answers.items() if answer.restricted is not None}
    model.eval()
    rank = {
        name: effective_rank(_features(model, tokenizer, tasks[task]))
        for name, task in (("scenes", "object"), (target, target))
    }
    return {
        "exact": exact,
        "restricted": restricted,
        "P": average(kept),
        "P_restricted": average({task: restricted[task] for task in kept}),
        "T": exact[target],
        "T_words": answers[target].words,
        "Avg": average(exact),
        "H": harmonic(average(kept), exact[target]),
        "effective_rank": rank,
        "answers": {task: answer.predictions for task, answer in answers.items()},
    }


def measure_features(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    target: str,
    split: Split,
    examples: int,
    checkpoint: Path,
) -> dict[str, Mapping[str, float]]:
    """For each task, of the hidden states z at image tokens: effective rank, and how far they are from pre-trained.

    Returns:
        "rank": of z. "drift": L_v, the mean of |z − z_pre|. "relative_drift": the same over the mean of |z_pre|.
    """
    model.eval()
    before = pretrained_features(checkpoint, target, split, examples)
    found: dict[str, dict[str, float]] = {"rank": {}, "drift": {}, "relative_drift": {}}
    for task, data in measured_tasks(target, split, examples).items():
        z = _features(model, tokenizer, data)
        drift = float(visual_alignment_loss(z, before[task]))
        found["rank"][task] = effective_rank(z)
        found["drift"][task] = drift
        found["relative_drift"][task] = drift / float(before[task].abs().mean())
    return dict(found)


@lru_cache(maxsize=4)
def pretrained_features(checkpoint: Path, target: str, split: Split, examples: int) -> dict[str, torch.Tensor]:
    """The checkpoint's z for each task: (16 × examples, 128)."""
    model, tokenizer = load_checkpoint(checkpoint)
    tasks = measured_tasks(target, split, examples)
    return {task: _features(model, tokenizer, data) for task, data in tasks.items()}


def _features(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, data: TaskData) -> torch.Tensor:
    return visual_features(model, prompt_batch(data.examples[:_RANK_EXAMPLES], tokenizer))

"""What is measured of a fine-tuned model: scores of every task, ranks and drift of its visual features."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from reproductions.methods.kl import answer_logits
from reproductions.mini.model.checkpoint import load_checkpoint
from reproductions.mini.model.evaluate import evaluate, visual_features
from reproductions.mini.world.data import (
    TaskData,
    pretrained_task_data,
    prompt_batch,
    target_data,
    text_task_data,
    training_batch,
)
from reproductions.mini.world.language import TEXT_TASKS
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.mini.world.scenes import Split
from reproductions.shared.scores import average, harmonic
from torch_mdgd import effective_rank, visual_alignment_loss

_RANK_EXAMPLES = 200


@lru_cache(maxsize=4)
def measured_tasks(target: str, split: Split, examples: int, draw: int = 0) -> dict[str, TaskData]:
    """The examples that measure: of every pre-trained task, then of the target. Another draw has others."""
    tasks = {task: pretrained_task_data(task, split, examples, draw) for task in PRETRAINED_TASKS}
    return tasks | {target: target_data(target, split, seed=draw)[:examples]}  # type: ignore[arg-type]


def measure(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    target: str,
    split: Split,
    examples: int,
    draw: int = 0,
    facts: bool = False,
) -> dict[str, Any]:
    """Scores of all pre-trained tasks and the target, their means, and the effective rank of the visual features.

    With `facts` also of questions without a picture, which are in none of these means.
    """
    tasks = measured_tasks(target, split, examples, draw)
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
        **(_facts(model, tokenizer) if facts else {}),
    }


def _facts(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    found = {task: evaluate(model, tokenizer, text_task_data(task)) for task in TEXT_TASKS}
    exact = {task: answer.exact for task, answer in found.items()}
    return {
        "P_facts": average(exact),
        "facts": {"exact": exact, "restricted": {task: answer.restricted for task, answer in found.items()}},
    }


def measure_features(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    target: str,
    split: Split,
    examples: int,
    checkpoint: Path,
    draw: int = 0,
) -> dict[str, Mapping[str, float]]:
    """For each task, of the hidden states z at image tokens: effective rank, and how far they are from pre-trained.

    Returns:
        "rank": of z. "drift": L_v, the mean of |z − z_pre|. "relative_drift": the same over the mean of |z_pre|.
    """
    model.eval()
    before = pretrained_features(checkpoint, target, split, examples, draw)
    found: dict[str, dict[str, float]] = {"rank": {}, "drift": {}, "relative_drift": {}}
    for task, data in measured_tasks(target, split, examples, draw).items():
        z = _features(model, tokenizer, data)
        drift = float(visual_alignment_loss(z, before[task]))
        found["rank"][task] = effective_rank(z)
        found["drift"][task] = drift
        found["relative_drift"][task] = drift / float(before[task].abs().mean())
    return dict(found)


@lru_cache(maxsize=4)
def pretrained_features(
    checkpoint: Path, target: str, split: Split, examples: int, draw: int = 0
) -> dict[str, torch.Tensor]:
    """The checkpoint's z for each task: (16 × examples, 128)."""
    model, tokenizer = load_checkpoint(checkpoint)
    tasks = measured_tasks(target, split, examples, draw)
    return {task: _features(model, tokenizer, data) for task, data in tasks.items()}


@torch.no_grad()
def divergence(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    target: str,
    split: Split,
    examples: int,
    checkpoint: Path,
    draw: int = 0,
) -> float:
    """KL(p_φ ‖ p_θ) on the target's prompts, in nats a token: what RL's Razor says forgetting follows (2509.04259).

    The mean over the tokens of φ's own greedy answers, which stand for samples of p_φ. φ is the checkpoint.
    """
    batches, before = pretrained_answers(checkpoint, target, split, examples, draw)
    model.eval()
    sums = [
        float((was.exp() * (was - _log_probabilities(model, batch))).sum())
        for batch, was in zip(batches, before, strict=True)
    ]
    return sum(sums) / sum(map(len, before))


@lru_cache(maxsize=4)
@torch.no_grad()
def pretrained_answers(
    checkpoint: Path, target: str, split: Split, examples: int, draw: int = 0, size: int = 100
) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """The target's prompts with the checkpoint's greedy answers, and its log-probabilities: (answer tokens, words)."""
    model, tokenizer = load_checkpoint(checkpoint)
    data = target_data(target, split, seed=draw)[:examples]  # type: ignore[arg-type]
    said = evaluate(model, tokenizer, data).predictions
    answered = [replace(example, answer=answer) for example, answer in zip(data.examples, said, strict=True)]
    batches = [training_batch(answered[start : start + size], tokenizer) for start in range(0, len(answered), size)]
    return batches, [_log_probabilities(model, batch) for batch in batches]


def _log_probabilities(model: LlavaForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = answer_logits(model(**batch).logits, batch["labels"])
    return logits.double().log_softmax(-1)


def _features(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, data: TaskData) -> torch.Tensor:
    return visual_features(model, prompt_batch(data.examples[:_RANK_EXAMPLES], tokenizer))

"""Fine-tuning the small LLaVA on a target task, and the whole of one run: fine-tune, then measure."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from reproductions.mini.data import TaskData, pretrained_task_data, prompt_batch, target_data, training_batch
from reproductions.mini.evaluate import average, evaluate, harmonic, visual_features
from reproductions.mini.methods import Method
from reproductions.mini.model import CHECKPOINT, load_checkpoint
from reproductions.mini.questions import PRETRAINED_TASKS, TARGET_TASKS
from reproductions.mini.scenes import Split
from torch_mdgd import MDGDOptimizer, effective_rank, mdgd_backward

BATCH = 32
WARM_UP = 10
_RANK_EXAMPLES = 200

OnStep = Callable[[int, float], None]
"""Is told of each step and its loss."""


def _nothing(step: int, loss: float) -> None:
    pass


@dataclass(frozen=True)
class Run:
    """One fine-tuning and its measurement.

    Attributes:
        method: how.
        target: "digits" or "caption".
        split: which examples measure it; "validation" to choose settings, "test" to report.
        seed: draws the batches. The examples that measure are the same for every seed.
        steps: optimizer steps.
        examples: how many measure each task.
        checkpoint: the pre-trained model.
    """

    method: Method
    target: str
    split: Split
    seed: int
    steps: int = 300
    examples: int = 200
    checkpoint: Path = CHECKPOINT

    def __post_init__(self) -> None:
        if self.target not in TARGET_TASKS:
            raise ValueError(f"target must be one of {', '.join(TARGET_TASKS)}, got {self.target!r}")


def trainable_parameters(model: LlavaForConditionalGeneration, layers: int = 2) -> list[torch.nn.Parameter]:
    """Freeze all but the last decoder layers and the projector, as the paper does; return what is left to train."""
    model.requires_grad_(False)
    trained = [*model.model.language_model.layers[-layers:], model.model.multi_modal_projector]
    return [parameter.requires_grad_() for module in trained for parameter in module.parameters()]


def finetune(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    data: TaskData,
    method: Method,
    *,
    seed: int,
    steps: int,
    on_step: OnStep = _nothing,
) -> list[float]:
    """Train in place: 10 warm-up steps, then linear decay to zero.

    Returns:
        the task loss of each step.
    """
    rng = np.random.default_rng(seed)
    optimizer = method.optimizer(trainable_parameters(model))
    scheduler = LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / steps))
    losses = []
    model.train()
    for step in range(steps):
        chosen = rng.choice(len(data), BATCH, replace=False)
        batch = training_batch([data.examples[i] for i in chosen], tokenizer)
        if isinstance(optimizer, MDGDOptimizer):
            loss = mdgd_backward(model, optimizer, batch)
        else:
            loss = model(**batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"{method.name}: the loss is {losses[-1]} at step {step}")
        on_step(step, losses[-1])
    return losses


def measure(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, target: str, split: Split, examples: int
) -> dict[str, Any]:
    """Scores of all pre-trained tasks and the target, their means, and the effective rank of the visual features."""
    tasks = {task: pretrained_task_data(task, split, examples) for task in PRETRAINED_TASKS}
    goal = target_data(target, split)[:examples]  # type: ignore[arg-type]
    answers = {task: evaluate(model, tokenizer, data) for task, data in (*tasks.items(), (target, goal))}
    exact = {task: answer.exact for task, answer in answers.items()}
    kept = {task: exact[task] for task in tasks}
    restricted = {task: answer.restricted for task, answer in answers.items() if answer.restricted is not None}
    model.eval()
    rank = {
        name: effective_rank(visual_features(model, prompt_batch(data.examples[:_RANK_EXAMPLES], tokenizer)))
        for name, data in (("scenes", tasks["object"]), (target, goal))
    }
    return {
        "exact": exact,
        "restricted": restricted,
        "P": average(kept),
        "P_restricted": average({task: restricted[task] for task in tasks}),
        "T": exact[target],
        "Avg": average(exact),
        "H": harmonic(average(kept), exact[target]),
        "effective_rank": rank,
        "answers": {task: answer.predictions for task, answer in answers.items()},
    }


def execute(run: Run, on_step: OnStep = _nothing) -> dict[str, Any]:
    """Load the checkpoint, fine-tune it unless the method trains nothing, measure it.

    Returns:
        what `measure` returns, with the method's settings, the number of trained numbers, losses and seconds.
    """
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    model, tokenizer = load_checkpoint(run.checkpoint)
    began, losses, trained = time.perf_counter(), [], 0
    if run.method.learning_rate is not None:
        data = target_data(run.target, "train", seed=run.seed)  # type: ignore[arg-type]
        losses = finetune(model, tokenizer, data, run.method, seed=run.seed, steps=run.steps, on_step=on_step)
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        trained = max(1, round(run.method.fraction * count))
    seconds = time.perf_counter() - began
    result = measure(model, tokenizer, run.target, run.split, run.examples)
    settings = {"learning_rate": run.method.learning_rate, **(run.method.wrap or {}), "fraction": run.method.fraction}
    return {
        "method": run.method.name,
        "label": run.method.label,
        "settings": settings,
        "target": run.target,
        "split": run.split,
        "seed": run.seed,
        "steps": run.steps,
        "trained": trained,
        "seconds": seconds,
        "losses": losses,
        **result,
    }

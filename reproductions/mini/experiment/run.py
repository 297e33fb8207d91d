"""The whole of one run: load the checkpoint, fine-tune, measure."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from reproductions.mini.experiment.finetune import BATCH, TRACED_EVERY, Course, OnStep, finetune, nothing
from reproductions.mini.experiment.measure import divergence, measure, measure_features
from reproductions.mini.experiment.methods import Method, Phi
from reproductions.mini.model.checkpoint import CHECKPOINT, knows_facts, load_checkpoint
from reproductions.mini.model.evaluate import evaluate
from reproductions.mini.world.data import target_data
from reproductions.mini.world.questions import TARGET_TASKS
from reproductions.mini.world.scenes import Split

# The masks, moments and snapshots are all there in the third step.
_PROFILED_STEPS = 3
_SHOWN_ANSWERS = 8


@dataclass(frozen=True)
class Run:
    """One fine-tuning and its measurement.

    Attributes:
        method: how.
        target: "digits", "caption" or "tiles".
        split: which examples measure it; "validation" to choose settings, "test" to report.
        seed: draws the batches.
        steps: optimizer steps.
        examples: how many measure each task.
        checkpoint: the pre-trained model.
        batch: examples a step.
        record: what the result holds. "answers": every answer and the loss of every step. "scores": neither.
            "study": the first answers of each task, losses and diagnostics of every fifth step, and, measured for
            it, ranks and drift of every task's features, the divergence from the pre-trained model on the target, and
            the memory of the first steps.
        first: other targets that are fine-tuned before, one after the other, in the same way.
        reference: what φ is for each of them: "renewed", the weights that it begins with; or "kept", those of the
            checkpoint.
        draw: which of the split's measure it, by the seed that draws them; 0 for those that runs share by default. The
            split of digits has 300 scans, so that draws of them overlap.
    """

    method: Method
    target: str
    split: Split
    seed: int
    steps: int = 300
    examples: int = 200
    checkpoint: Path = CHECKPOINT
    batch: int = BATCH
    record: Literal["answers", "study", "scores"] = "answers"
    first: tuple[str, ...] = ()
    reference: Phi = "renewed"
    draw: int = 0

    def __post_init__(self) -> None:
        for name, target in (("target", self.target), *(("first", target) for target in self.first)):
            if target not in TARGET_TASKS:
                raise ValueError(f"{name} must be one of {', '.join(TARGET_TASKS)}, got {target!r}")

    @property
    def key(self) -> str:
        """What a result is found again by: all that it depends on.

        Fields at their defaults are left out, so that one that is added later does not disown the results there are;
        so are name and label, so that systems which come to the same settings share their runs.
        """
        told = _changed(self)
        del told["method"]["label"], told["method"]["name"]
        return json.dumps(told, sort_keys=True)


def _changed(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if not is_dataclass(value):
        return value
    present = {f.name: (getattr(value, f.name), f.default) for f in fields(value)}
    return {name: _changed(now) for name, (now, default) in present.items() if now != default}


def execute(run: Run, on_step: OnStep = nothing) -> dict[str, Any]:
    """Load the checkpoint, fine-tune it unless the method trains nothing, measure it.

    Returns:
        what `measure` returns, with the method's settings, the number of trained numbers, losses and seconds.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    model, tokenizer = load_checkpoint(run.checkpoint)
    reference = {name: p.detach().clone() for name, p in model.named_parameters()} if run.reference == "kept" else None
    began, began_here, course = time.perf_counter(), time.process_time(), Course()
    for target in (*run.first, run.target) if run.method.learning_rate is not None else ():
        data = target_data(target, "train", seed=run.seed)  # type: ignore[arg-type]
        course = finetune(
            model, tokenizer, data, run.method,
            seed=run.seed, steps=run.steps, batch_size=run.batch, on_step=on_step, reference=reference,
        )  # fmt: skip
    seconds, processor_seconds = time.perf_counter() - began, time.process_time() - began_here
    result = {
        "method": run.method.name,
        "label": run.method.label,
        "settings": run.method.settings,
        "target": run.target,
        "split": run.split,
        "seed": run.seed,
        "steps": run.steps,
        "batch": run.batch,
        "checkpoint": run.checkpoint.name,
        "architecture": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": course.trained,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
        "losses": course.losses,
        **measure(model, tokenizer, run.target, run.split, run.examples, run.draw, knows_facts(run.checkpoint)),
    }
    if run.first:
        before = [target_data(target, run.split, seed=run.draw) for target in run.first]  # type: ignore[arg-type]
        kept = (evaluate(model, tokenizer, data[: run.examples]).words for data in before)
        result |= {f"T_{place}": words for place, words in zip(("first", "second"), kept, strict=False)}
    if run.record == "study":
        measured = run.target, run.split, run.examples, run.checkpoint, run.draw
        result |= measure_features(model, tokenizer, *measured)
        result["kl"] = divergence(model, tokenizer, *measured)
        result["traces"] = course.traces
        result["losses"] = [fmean(five) for five in _chunks(course.losses, TRACED_EVERY)]
        result["answers"] = {task: answers[:_SHOWN_ANSWERS] for task, answers in result["answers"].items()}
        result["peak_bytes"] = peak_bytes(run)
    elif run.record == "scores":
        del result["losses"], result["answers"]
    return result if run.record == "answers" else rounded(result)


def peak_bytes(run: Run) -> int:
    """The most bytes that torch's CPU allocator gave out at once in the first three steps, beyond model and data.

    Optimizer state, reference, gradients, activations and temporaries count; the weights do not. It is counted from
    the allocator's own events, so the machine's load does not change it. Zero for a method that trains nothing.
    """
    if run.method.learning_rate is None:
        return 0
    model, tokenizer = load_checkpoint(run.checkpoint)
    data = target_data(run.target, "train", seed=run.seed)  # type: ignore[arg-type]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        finetune(
            model, tokenizer, data, run.method.with_settings(tailor=None, mix=None, drop=None, shrink=None),
            seed=run.seed, steps=_PROFILED_STEPS, batch_size=run.batch,
        )  # fmt: skip
    found: Any = profiler.profiler
    events = ((e.start_ns(), e.nbytes()) for e in found.kineto_results.events() if e.name() == "[memory]")
    held = highest = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        highest = max(highest, held)
    return highest


def rounded(value: Any) -> Any:
    """The same with floats at five significant digits, which keeps committed results small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value


def _chunks(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]

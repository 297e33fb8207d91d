"""A row that answers with the targets: what has to score 100 if reading, asking, scoring and writing down are right."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from reproductions.paper.config import Experiment
from reproductions.paper.run.evaluate import evaluate
from reproductions.paper.run.work import Workshop
from reproductions.shared.files import write

NAME = "oracle"


class Oracle:
    """A model that looks the answers up, and is the given one in everything else."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.targets: list[str] = []

    def collate(self, examples: Sequence[Any], *, answers: bool) -> dict[str, Any]:
        """The model's batch, whose answers are remembered until they are asked for."""
        self.targets = [example.target for example in examples]
        batch: dict[str, Any] = self.model.collate(examples, answers=answers)
        return batch

    def generate(self, batch: Mapping[str, Any], max_new_tokens: int, **search: Any) -> list[str]:
        """The targets of the batch that was collated last: no worker processes may collate ahead."""
        return self.targets

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def run_oracle(experiment: Experiment, results: Path, console: Console) -> Path:
    """Measure it on all tasks of an experiment, with the smoke test's sizes.

    Returns:
        the run's folder; captions score what CIDEr gives to one of the references.
    """
    folder = results / experiment.name / NAME
    folder.mkdir(parents=True, exist_ok=True)
    work = Workshop(experiment, torch.device("cpu"))
    vars(work)["model"] = Oracle(work.model)
    config = {"configuration": experiment.as_dict() | {"methods": {}}, "title": experiment.title, "method": NAME,
              "method_title": "Oracle", "seed": experiment.seed, "smoke": True}  # fmt: skip
    write(folder / "config.json", json.dumps(config, indent=1))
    with Progress(console=console, disable=True) as bars:
        for task in experiment.tasks:
            scores = evaluate(work, task, folder, bars)["scores"]
            console.print(f"  oracle {task:12} {scores['score']:6.2f}")
    write(folder / "status.json", json.dumps({"stage": "done", "wall_seconds": 0.0}))
    return folder

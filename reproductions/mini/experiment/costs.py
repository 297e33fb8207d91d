"""What a step of every system costs, all of them in turn in one process, so that only ratios are left of the machine.

Times of the runs themselves would be of whatever else the machine did meanwhile.
"""

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import track

from reproductions.mini.experiment.finetune import prepare, training
from reproductions.mini.experiment.methods import Method
from reproductions.mini.experiment.remembered import samples
from reproductions.mini.model.checkpoint import CHECKPOINT, load_checkpoint
from reproductions.mini.world.data import target_data
from reproductions.shared.results import read_lines

FILE = "costs.jsonl"
WARM_UP, TIMED = 5, 30


def measure_costs(
    folder: Path,
    cell: str,
    target: str,
    methods: Mapping[str, Method],
    batch_size: int,
    console: Console,
    checkpoint: Path = CHECKPOINT,
) -> None:
    """Time the systems of a cell, unless `costs.jsonl` has all of them; other cells' lines stay.

    Args:
        folder: of the study.
        cell: its name.
        target: what is trained.
        methods: by name, with the settings that were chosen; those that train nothing are left out.
        batch_size: examples a step.
        console: for progress.
        checkpoint: the pre-trained model.
    """
    training_ones = {name: method for name, method in methods.items() if method.learning_rate is not None}
    lines = read_lines(folder / FILE)
    settings = {name: json.dumps(method.settings, sort_keys=True) for name, method in training_ones.items()}
    if settings == {line["system"]: line["settings"] for line in lines if line["cell"] == cell}:
        return
    seconds = step_seconds(training_ones, target, batch_size, console, TIMED, checkpoint)
    new = [
        {"cell": cell, "system": name, "settings": settings[name], "seconds": value, "steps": TIMED}
        for name, value in seconds.items()
    ]
    kept = [line for line in lines if line["cell"] != cell]
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in [*kept, *new]))


def step_seconds(
    methods: Mapping[str, Method],
    target: str,
    batch_size: int,
    console: Console,
    steps: int = TIMED,
    checkpoint: Path = CHECKPOINT,
) -> dict[str, float]:
    """Mean seconds of processor time of a step, on one thread, the methods in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = target_data(target, "train")  # type: ignore[arg-type]
        courses = {}
        for name, method in methods.items():
            model, tokenizer = load_checkpoint(checkpoint)
            trained, parameters = prepare(model, method, partial(samples, model, tokenizer, data, method, 0))
            courses[name] = training(
                trained, tokenizer, data, method, parameters, seed=0, steps=WARM_UP + steps, batch_size=batch_size
            )
        times: dict[str, list[float]] = {name: [] for name in courses}
        for _ in track(range(WARM_UP + steps), f"step times, {target}", console=console, transient=True):
            for name, course in courses.items():
                began = time.process_time()
                next(course)
                times[name].append(time.process_time() - began)
        return {name: fmean(values[WARM_UP:]) for name, values in times.items()}
    finally:
        torch.set_num_threads(threads)


def read_costs(folder: Path, cell: str) -> dict[str, float]:
    """Seconds a step by system, as far as they were measured."""
    return {line["system"]: line["seconds"] for line in read_lines(folder / FILE) if line["cell"] == cell}

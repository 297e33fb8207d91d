"""A folder of made-up results of the study."""

import json
from pathlib import Path

import numpy as np
from rich.console import Console

from reproductions.mini.experiment import study
from reproductions.mini.experiment.cells import CELLS
from reproductions.mini.experiment.run import Run
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.world.questions import PRETRAINED_TASKS

CELL = CELLS[0]
SIZE = study.Size()
QUIET = Console(quiet=True)
SCORES = {
    "zero-shot": (0, 99, 70), "fine-tune": (92, 80, 64), "fine-tune-low": (88, 90, 66), "mdgd": (88, 96, 69),
    "align": (88, 96, 69), "history": (92, 93, 68), "lora": (45, 60, 72), "replay": (91, 98, 71),
}  # fmt: skip
"""T, P and rank by system."""
COSTS = (("digits-adamw", "mdgd", 0.3), ("digits-adamw", "fine-tune", 0.1), ("digits-sgd", "mdgd", 0.5))
"""Seconds a step by cell and system."""


def result(run: Run, T: float, P: float, rank: float) -> dict:
    """A result as of `execute`, with an answer of every task that is right for the better models."""
    tasks = (*PRETRAINED_TASKS, run.target)
    answer = "<b>&" if P > 85 else "two"
    return {
        "key": run.key, "method": "whoever ran first", "settings": run.method.settings, "target": run.target,
        "split": run.split, "seed": run.seed, "steps": run.steps, "batch": run.batch, "trained": 459_520,
        "versions": {"torch": "2.13.0"}, "P": P, "P_restricted": P + 1, "T": T, "T_words": T + 2,
        "exact": dict.fromkeys(tasks, P), "restricted": dict.fromkeys(tasks, P + 1),
        "effective_rank": {"scenes": rank, run.target: rank - 20},
        "rank": dict.fromkeys(tasks, rank), "drift": dict.fromkeys(tasks, 0.2),
        "relative_drift": dict.fromkeys(tasks, 0.1), "losses": [1.0, 0.5],
        "traces": {"cos_task_visual": [0.5, 0.1], "visual_loss": [0.1, 0.2]} if run.method.wrap else {},
        "answers": {task: [answer, "one"] for task in tasks}, "peak_bytes": 2_000,
    }  # fmt: skip


def made_up(folder: Path, scores=SCORES, seeds=range(4), size=SIZE, noise=0.3, frontier=(), cost_of_rate=200.0):
    """A folder of results: settings of every system tuned, then these scores on these seeds, a little apart.

    T rises with the learning rate, and P falls with it unless its cost is zero.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tuned = {
        run.key: result(
            run, 50 + 10 * run.method.learning_rate**0.1, 90 / (1 + cost_of_rate * run.method.learning_rate), 60
        )
        for run in study.tuning_runs(CELL, [system for system in SYSTEMS.values() if system.grid], size)
    }
    lines = {}
    for name, (T, P, rank) in scores.items():
        for run in study.test_runs(CELL, [SYSTEMS[name]], seeds, size, tuned):
            wobble = 0 if name == "zero-shot" else noise * rng.standard_normal(3)
            lines[run.key] = result(run, *np.clip(np.array([T, P, rank]) + wobble, 0, 100).tolist())
    varied = study.frontier_runs(CELL, [SYSTEMS[name] for name in frontier], size, tuned)
    curves = [result(run, 80 + i, 90 - i, 60) for i, run in enumerate(varied)]
    files = {"tune": tuned.values(), "test": lines.values(), "frontier": curves}
    for stage, found in files.items():
        if found:
            (folder / f"{stage}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return folder

"""A folder of results as runs leave it, made up: every row of both tables, without a model."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from reproductions.paper.config import load_experiment
from reproductions.paper.data import DATASETS
from reproductions.paper.data.shapes import COLOURS, SHAPES
from reproductions.paper.report.published import PublishedExperiment, PublishedRow, published
from reproductions.paper.report.results import Result

SHIFT = {"zero-shot": -0.25, "fine-tune": 2.5, "mdgd": 0.75, "mdgd-gm": 0.5}
"""What is added to published scores to make ours; and how far features drift."""


def write_results(
    folder: Path, experiments: Iterable[str] = published(), methods: Sequence[str] = (), smoke: bool = False
) -> Path:
    """Write runs of the given experiments; all their published methods by default."""
    for name in experiments:
        experiment = published()[name]
        for method, row in experiment.rows.items():
            if not methods or method in methods:
                write_run(folder, experiment, row, smoke)
    return folder


def write_run(folder: Path, experiment: PublishedExperiment, row: PublishedRow, smoke: bool = False) -> Result:
    """Write one run."""
    run = folder / experiment.name / row.method
    (run / "evaluation").mkdir(parents=True)
    rng = np.random.default_rng([*experiment.name.encode(), *row.method.encode()])
    drift = SHIFT.get(row.method, 1.0)
    configuration = json.loads(json.dumps(load_experiment(experiment.name).as_dict() | {"methods": {}}))
    configuration["methods"] = {row.method: load_experiment(experiment.name).methods.get(row.method, {})}
    config = {
        "configuration": configuration, "experiment": experiment.name, "title": f"{experiment.model} somewhere",
        "method": row.method, "method_title": row.label, "seed": 0, "smoke": smoke, "device": "a made-up GPU",
        "python": "3.11.2", "versions": {"torch": "2.13.0"}, "git": "0123456789abcdef",
    }  # fmt: skip
    _json(run / "config.json", config)
    _json(run / "status.json", {"stage": "done", "wall_seconds": 5025.0})
    if row.trained:
        _json(run / "trained.json", {"trained_numbers": row.trained, "changed_numbers": row.trained - 1})
    for task in experiment.tasks:
        _write_task(run, experiment, row, task, drift, rng)
    if row.method != "zero-shot":
        _write_log(run / "training.jsonl", drift, rng)
    if row.method == "mdgd-gm":
        (run / "analysis").mkdir()
        ratios = [0.9, 0.1, 0.3, 0.5, 0.7]
        entries = [{"ratio": r, "cos": 0.95 - 0.4 * r, "visual_loss": 0.05 + 0.1 * r**2} for r in ratios]
        _json(run / "analysis" / "masking.json", entries)
    return Result(run)


def _write_task(
    run: Path, experiment: PublishedExperiment, row: PublishedRow, task: str, drift: float, rng: np.random.Generator
) -> None:
    metric = DATASETS[task].metric
    score = min(100.0, max(0.0, row.scores[task] + drift))
    scores = {"score": score} | ({"cider": score} if metric == "cider" else {})
    rank = 40.0 - 3 * drift + 2 * experiment.tasks.index(task)
    found = {"task": task, "metric": metric, "scores": scores, "effective_rank": rank, "n": 12}
    _json(run / "evaluation" / f"{task}.json", found)
    # The questions are the same for every method; what is answered differs.
    asked = np.random.default_rng([*task.encode()])
    names = [f"{asked.choice(list(COLOURS))} {asked.choice(SHAPES)}" for _ in range(12)]
    right = rng.random(12) < score / 100
    lines = [
        {"id": str(i), "question": f"Which colour & shape, {i}?", "answers": [name],
         "prediction": name if right[i] else "<no idea>", "score": 100.0 * bool(right[i])}
        for i, name in enumerate(names)
    ]  # fmt: skip
    if row.method == "mdgd":
        (run / "evaluation" / f"{task}.pictures").mkdir()
        for i, name in enumerate(names):
            Image.new("RGB", (64, 48), name.split()[0]).save(run / "evaluation" / f"{task}.pictures" / f"{i}.jpg")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "evaluation" / f"{task}.predictions.jsonl").write_text(text)
    (run / "features").mkdir(exist_ok=True)
    base = np.random.default_rng(7).normal(size=(24, 16))
    features = {kind: base + drift * size for kind, size in (("visual", 0.6), ("multimodal", 1.5))}
    save_file({k: v.astype(np.float32) for k, v in features.items()}, run / "features" / f"{task}.safetensors")


def _write_log(path: Path, drift: float, rng: np.random.Generator) -> None:
    lines = []
    for step in range(5, 405, 5):
        loss = 2.5 * np.exp(-step / 80) + 0.6 + 0.1 * drift + 0.15 * rng.normal()
        lines.append({"step": step, "loss": float(loss), "visual_loss": 0.01 * step, "cos_task_visual": -0.2})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))

"""`python -m reproductions tune`: settings chosen on validation examples, as many candidates for each method.

What is measured for the tables is never looked at. Of old tasks those take part that have examples besides; the target
has to have a validation split. Replay, EWC and CorDA remember training examples of old tasks, among which validation
examples of TextVQA, OK-VQA and A-OKVQA may be: that favours them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from reproductions.methods import METHODS
from reproductions.paper.config import Experiment, method_of
from reproductions.paper.data import DATASETS
from reproductions.paper.run import ranks
from reproductions.paper.run.row import run_row
from reproductions.paper.run.rows import look_at_data, pin, require_reporting
from reproductions.paper.run.sparing import require_possible
from reproductions.shared.fields import ConfigError
from reproductions.shared.files import read_json, write
from reproductions.shared.scores import average, harmonic

CANDIDATES = 4
"""Of every method, so that none is tuned harder than another."""
RATES, TWO_RATES, WEIGHTS = (0.1, 0.3, 1.0, 3.0), (0.3, 1.0), (1.0, 3.0)
"""Multiples of the experiment's learning rate, and of a method's own weight."""
OWN = ("align", "strength", "weight", "regularize")
"""What a method's weight is called, the first that it has."""


def candidates(experiment: Experiment, name: str) -> list[dict[str, Any]]:
    """Settings to try: four rates, or two rates and two weights where the method has one; λ where it mixes."""
    method = method_of(experiment, name)
    if method.begins_with is not None:
        field = "share" if hasattr(method.settings, "share") else "omega"
        return [{field: value} for value in (0.2, 0.4, 0.6, 0.8)]
    base, weight = (
        experiment.training.learning_rate * method.rate,
        next((field for field in OWN if hasattr(method.settings, field)), None),
    )
    if weight is None:
        return [{"learning_rate": _short(base * x)} for x in RATES]
    own = getattr(method.settings, weight) or getattr(type(method.settings)(), weight)
    return [
        {"learning_rate": _short(base * x), weight: _short(own * y)} for x, y in product(TWO_RATES, WEIGHTS)
    ]  # fmt: skip


def on_validation(experiment: Experiment) -> Experiment:
    """The experiment, measured on validation examples.

    Raises:
        ConfigError: the target has none, or no old task has.
    """
    if DATASETS[experiment.target].validation in (None, DATASETS[experiment.target].training):
        raise ConfigError(f"{experiment.name}: {experiment.target} has no validation split to tune on")
    kept = tuple(task for task in experiment.pretrained if DATASETS[task].validation)
    if not kept:
        raise ConfigError(f"{experiment.name}: no pre-trained task has examples that are not measured")
    return replace(
        experiment, pretrained=kept, evaluation=replace(experiment.evaluation, split="validation"),
        name=f"{experiment.name}-tuning",
    )  # fmt: skip


def tune(
    experiment: Experiment, names: Sequence[str], results: Path, *, smoke: bool, console: Console
) -> dict[str, Mapping[str, Any]]:
    """Run every candidate, and choose for each method the one with the best H(P, T).

    Candidates that are done are not run again.

    Args:
        experiment: as it would be run.
        names: methods that train.
        results: folder; candidates lie in its ``tuning``.
        smoke: noted in the results.
        console: for progress.

    Returns:
        what ``tuning.json`` holds: for each method its settings, their scores, and those of all others.

    Raises:
        ConfigError: a method does not train, or cannot as it is set; or as :func:`on_validation`.
        DataError: data cannot be had.
    """
    there = on_validation(experiment)
    require_reporting(there)
    for name in names:
        if not METHODS[name].trains:
            raise ConfigError(f"{name} trains nothing that could be tuned")
        require_possible(there, method_of(there, name))
    ranks.join()
    with ranks.in_turn():
        for error in look_at_data({there.name: names}, {there.name: there}, console):
            raise error
        if not smoke:
            there = replace(there, data=replace(there.data, revisions={**pin(results), **there.data.revisions}))
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        tried: list[dict[str, Any]] = []
        for i, settings in enumerate(candidates(experiment, name)):
            own = {**experiment.methods.get(name, {}), **settings}
            candidate = replace(there, methods={**experiment.methods, name: own})
            run = run_row(candidate, name, results / "tuning" / str(i), smoke=smoke, console=console)
            tried.append({"settings": settings, **scores_of(run, candidate)})
        best = max(tried, key=lambda one: one["H"])
        found[name] = {"chosen": best["settings"], "candidates": tried}
        told = " ".join(f"--set methods.{name}.{key}={value}" for key, value in best["settings"].items())
        console.print(f"{name}: P {best['P']:.1f}, T {best['T']:.1f}, H {best['H']:.1f}: {told}", soft_wrap=True)
    settings = {"experiment": asdict(there), "methods": found}
    if ranks.is_first():
        write(results / f"{experiment.name}.tuning.json", json.dumps(settings, indent=1))
    return found


def scores_of(run: Path, experiment: Experiment) -> dict[str, float]:
    """P, T and H(P, T) of a run that is done."""
    files = {task: run / "evaluation" / f"{task}.json" for task in experiment.tasks}
    scores = {task: float(read_json(path)["scores"]["score"]) for task, path in files.items()}
    T = scores.pop(experiment.target)
    P = average(scores)
    return {"P": P, "T": T, "H": harmonic(P, T)}


def _short(value: float) -> float:
    return float(f"{value:.3g}")

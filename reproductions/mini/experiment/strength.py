"""Which strength of the anchor carries over: from task to task, optimizer to optimizer, rate to rate, and to LoRA.

All on validation examples and on the seeds that settings are chosen with. An anchor is calibrated with random words.
Beside its strengths relative to the size of a layer's answers, which are the default, stand three other forms:
strengths that are absolute, a pull on all weights alike (C = I: L2-SP, and with LoRA ‖ΔW‖²), and the hard projection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from reproductions.mini.experiment.methods import Base, Method
from reproductions.mini.experiment.outcomes import SCORES
from reproductions.mini.experiment.parallel import execute_all
from reproductions.mini.experiment.run import Run
from reproductions.mini.experiment.scores import mean
from reproductions.mini.experiment.study import Size, checkpoint_of
from reproductions.mini.experiment.systems import LORA_RANK
from reproductions.mini.experiment.tune import SEEDS
from reproductions.shared.results import Result, read_results
from reproductions.shared.tables import Table
from torch_mdgd import Anchor

DEFAULT: float = signature(Anchor).parameters["strength"].default
FACTORS = (1.0, 0.5, 2.0)
"""Of each cell's learning rate."""


@dataclass(frozen=True)
class Place:
    """What is trained on what: a cell of the table.

    Attributes:
        title: in the table.
        target: "digits" or "caption".
        steps: as in the study.
        rate: of learning.
        base: the optimizer.
        lora: whether adapters on all linear layers are trained, in place of the last layers' weights.
    """

    title: str
    target: str
    steps: int
    rate: float
    base: Base = "adamw"
    lora: bool = False


PLACES: dict[str, Place] = {
    "caption-lora": Place("captions, LoRA", "caption", 300, 8e-3, lora=True),
    "digits-lora": Place("digits, LoRA", "digits", 200, 4e-3, lora=True),
    "caption-adamw": Place("captions, AdamW", "caption", 300, 4e-3),
    "digits-adamw": Place("digits, AdamW", "digits", 200, 2e-3),
    "caption-sgd": Place("captions, SGD", "caption", 300, 0.2, "sgd"),
}

FORMS: dict[str, dict[str, Any]] = {
    **{f"{strength:g}": {"anchor": strength} for strength in (0.3, 1.0, 3.0, 5.0, 10.0, 30.0)},
    **{f"absolute-{x:g}": {"anchor": x, "relative": False} for x in (0.003, 0.01, 0.03)},
    **{f"l2-{weight:g}": {"pull": weight} for weight in (0.003, 0.01, 0.03, 0.1)},
    "project-0.9": {"wrap": {"update": "project", "space": "step"}, "inputs": 0.9},
}
"""Settings by what the command line calls them: numbers are strengths, relative ones."""

_DEFAULT = f"{DEFAULT:g}"


def runs(
    places: Sequence[str], forms: Sequence[str], factors: Sequence[float], seeds: Sequence[int], size: Size
) -> list[Run]:
    """Every form in every cell, at the cells' own rates first."""
    return [
        run_of(place, form, factor, seed, size)
        for seed in seeds
        for factor in factors
        for form in forms
        for place in places
    ]


def run_of(place: str, form: str, factor: float, seed: int, size: Size) -> Run:
    """A run on validation examples."""
    where = PLACES[place]
    rate = float(f"{where.rate * factor:.4g}")
    method = Method(f"strength-{form}", f"{where.title}, {form}", rate, base=where.base, **FORMS[form])
    if where.lora:
        method = method.with_settings(lora=LORA_RANK, adapters="all")
    return Run(
        method, where.target, "validation", seed, size.steps or where.steps, size.tuning_examples, checkpoint_of(seed),
        size.batch, "scores",
    )  # fmt: skip


def require_tuning_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError for a seed that reported numbers may use."""
    for seed in seeds:
        if seed not in SEEDS:
            raise ValueError(f"seed {seed} is kept for tests; settings are chosen with {', '.join(map(str, SEEDS))}")


def strength(
    folder: Path,
    places: Sequence[str],
    forms: Sequence[str],
    factors: Sequence[float],
    seeds: Sequence[int],
    size: Size,
    console: Console,
    workers: int | None = None,
) -> Table:
    """Run what `strength.jsonl` does not hold yet; print a table of all that it holds then, and write `strength.md`.

    Args:
        folder: for the two files.
        places: of `PLACES`.
        forms: of `FORMS`.
        factors: of `FACTORS`.
        seeds: of those that settings are chosen with.
        size: how large.
        console: for progress and the table.
        workers: processes; one a core by default.
    """
    require_tuning_seeds(seeds)
    execute_all(runs(places, forms, factors, seeds, size), folder / "strength.jsonl", console, workers)
    table = table_of(read_results(folder / "strength.jsonl"), size)
    console.print(table.rich)
    (folder / "strength.md").write_text(table.markdown, encoding="utf-8")
    return table


def table_of(found: Mapping[str, Result], size: Size) -> Table:
    """All that was run, and what was not; H is held against others of the same cell at the same rate and seeds."""
    rows, losses, lacking = [], {}, {}
    for place, where in PLACES.items():
        for factor in FACTORS:
            tried = {form: _results(found, place, form, factor, size) for form in FORMS}
            tried = {form: results for form, results in tried.items() if results}
            lacking[place, factor] = tuple(form for form in FORMS if form not in tried)
            losing = {form: _behind(form, tried) for form in tried}
            if _DEFAULT in tried and len(tried) > 1:
                losses[f"{where.title} at {where.rate * factor:g}"] = losing[_DEFAULT]
            for form, results in tried.items():
                scores = [f"{mean([*results.values()], SCORES[name]):.1f}" for name in ("T", "P", "P exact", "H")]
                behind = f"−{losing[form]:.1f}" if losing[form] >= 0.05 else "best"
                name = f"{form}, the default" if form == _DEFAULT else form
                rows.append(
                    (where.title, f"{where.rate * factor:g}", name, *scores, behind, str(len(tried[form])))
                )  # fmt: skip
    notes = [
        f"Validation examples; how many were run of the seeds {', '.join(map(str, SEEDS))}, which choose settings. "
        "T: exact match of digits, right content words of captions. P: of the old tasks, exact after digits, "
        "restricted to a task's answers after captions. Form: exact match of the old tasks. H: harmonic mean of T "
        "and P; behind the best on the seeds of both. Strengths are relative to the size of a layer's answers; l2 is "
        "a pull on all weights alike, project the hard projection.",
        *_told_of_the_default(losses),
        *_told_of_what_lacks(lacking),
    ]
    columns = ("cell", "rate", "strength", "T", "P", "form", "H", "behind the best", "seeds")
    return Table("Which strength carries over", columns, tuple(rows), tuple(notes))


def _results(found: Mapping[str, Result], place: str, form: str, factor: float, size: Size) -> dict[int, Result]:
    keys = {seed: run_of(place, form, factor, seed, size).key for seed in SEEDS}
    return {seed: found[key] for seed, key in keys.items() if key in found}


def _behind(form: str, tried: Mapping[str, Mapping[int, Result]]) -> float:
    """How much more H the best of the others has, on the seeds of both; 0 for none."""
    H = {name: {seed: mean([result], SCORES["H"]) for seed, result in other.items()} for name, other in tried.items()}
    shared = {name: [seed for seed in H[form] if seed in H[name]] for name in H}
    return max(fmean(H[name][seed] - H[form][seed] for seed in seeds) for name, seeds in shared.items() if seeds)


def _told_of_the_default(losses: Mapping[str, float]) -> list[str]:
    if not losses:
        return []
    worst = max(losses, key=losses.__getitem__)
    return [
        f"The default strength, {_DEFAULT}, is behind the best that was run in the same cell at the same rate by "
        f"{fmean(losses.values()):.1f} of H in the mean of {len(losses)}, and by {losses[worst]:.1f} at most ({worst})."
    ]


def _times(factor: float) -> str:
    return "the cells' rates" if factor == 1 else f"{factor:g} times these"


def _told_of_what_lacks(lacking: Mapping[tuple[str, float], tuple[str, ...]]) -> list[str]:
    """Which forms have no result; cells that lack the same are told together."""
    told = []
    for factor in FACTORS:
        groups: dict[tuple[str, ...], list[str]] = {}
        for place, where in PLACES.items():
            groups.setdefault(lacking[place, factor], []).append(where.title)
        for forms, titles in groups.items():
            if forms:
                cells = "all cells" if len(titles) == len(PLACES) else "; ".join(titles)
                what = "everything" if len(forms) == len(FORMS) else ", ".join(forms)
                told.append(f"Not run yet at {_times(factor)}, {cells}: {what}.")
    return told

"""What was tried beside the study's systems, on validation examples alone: other masks, other layers, full directions.

Every one is tuned as the study's systems are, in the study's first cell and in the same file, so that those of the
study beside which it stands need no runs of their own. None of these numbers is a result: they say what to test.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console

from reproductions.mini.experiment.cells import CELLS
from reproductions.mini.experiment.methods import GONE, Method
from reproductions.mini.experiment.parallel import execute_all
from reproductions.mini.experiment.scores import h_scores, kept, mean, target_score
from reproductions.mini.experiment.study import Size, chosen, tuning_runs
from reproductions.mini.experiment.systems import ALPHAS, HIGH_PAIR, PAIR, RATES, SHORT, SYSTEMS, System
from reproductions.shared.results import Result, read_results
from reproductions.shared.tables import Table

CELL = CELLS[0]


def _masked(name: str, label: str, about: str) -> System:
    method = Method(f"mask-{name}", label, 1e-2, {"align": 10.0, "regularize": 0.0}, 0.1, name)
    return System(method, about, {"learning_rate": HIGH_PAIR, "align": ALPHAS})


def _layers(name: str, label: str) -> System:
    method = Method(f"inputs-{name}", label, 1e-3, {"update": "project", "space": "step"}, inputs=0.9, layers=name)  # type: ignore[arg-type]
    return System(method, "inputs of these layers alone", {"learning_rate": PAIR, "inputs": (0.7, 0.9)})


GROUPS: Mapping[str, tuple[System, ...]] = {
    "Which tenth of the numbers, with αv": (
        SYSTEMS["mdgd-gm"],
        SYSTEMS["random-align"],
        SYSTEMS["magnitude-align"],
        _masked("tensor", "top g̃ ⊙ g̃₀ of each tensor", "the published score, the same share everywhere"),
        _masked("batches", "top g̃ ⊙ g̃₀ of 8 batches", "the published score, with less chance in it"),
        _masked("task", "top F", "what moves the loss"),
        _masked("ratio", "top F / (V + ε)", "what moves the loss and not the features"),
        _masked("still", "lowest V", "what does not move the features"),
        _masked("rows", "rows by F", "whole rows"),
        _masked("mixed", "half by F, half at random", "some of each"),
    ),
    "Inputs of which layers are protected": (
        SYSTEMS["inputs"],
        _layers("decoder", "decoder"),
        SYSTEMS["inputs-projector"],
        _layers("attention", "attention"),
        _layers("mlp", "MLP"),
    ),
    "How a history of 16 is kept": (
        SYSTEMS["history"],
        System(
            Method(
                "history-full", "step, history 16, in full", 1e-3,
                {"update": "project", "space": "step", "history": 16}, mask="all",
            ),
            "all numbers of every direction, in place of two vectors a matrix",
            {"learning_rate": RATES},
        ),
    ),
}  # fmt: skip


def leads(folder: Path, size: Size, console: Console, workers: int | None = None) -> list[Table]:
    """Run what `tune.jsonl` does not hold yet, print the tables and write them to `leads.md`.

    Masks that cannot be made any more have a row where `tune.jsonl` holds all their runs.

    Args:
        folder: of the study.
        size: how large.
        console: for progress.
        workers: processes; one a core by default.
    """
    done = read_results(folder / "tune.jsonl")
    groups = {title: [s for s in group if _can_be_shown(s, size, done)] for title, group in GROUPS.items()}
    runs = tuning_runs(CELL, [system for group in groups.values() for system in group], size)
    found = {result["key"]: result for result in execute_all(runs, folder / "tune.jsonl", console, workers)}
    tables = [_table(title, group, size, found) for title, group in groups.items()]
    for table in tables:
        console.print(table.rich)
    (folder / "leads.md").write_text("\n".join(table.markdown for table in tables), encoding="utf-8")
    return tables


def _can_be_shown(system: System, size: Size, done: Mapping[str, Result]) -> bool:
    return system.method.mask not in GONE or all(run.key in done for run in tuning_runs(CELL, [system], size))


def _table(title: str, group: Sequence[System], size: Size, found: dict[str, Result]) -> Table:
    rows = []
    for system in group:
        method = chosen(CELL, system, size, found)
        runs = tuning_runs(CELL, [system], size)
        best = [found[run.key] for run in runs if run.method == method]
        by_candidate = {str(run.method): [found[r.key] for r in runs if r.method == run.method] for run in runs}
        H = sorted(mean(results, lambda r: h_scores(r)["H"]) for results in by_candidate.values())
        settings = ", ".join(f"{SHORT.get(name, name)} {method.settings[name]:g}" for name in system.grid)
        scores = [f"{mean(best, score):.1f}" for score in (target_score, kept)]
        rows.append((system.label, settings, *scores, f"{H[-1]:.1f}", f"{fmean(H):.1f}"))
    columns = ("system", "settings", "T", "P", "H", "mean H of 4 candidates")
    note = f"{CELL.target}, {CELL.base}: validation examples, mean of two seeds, the best of four candidates by H."
    return Table(title, columns, tuple(rows), (note,))

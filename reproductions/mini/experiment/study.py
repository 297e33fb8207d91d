"""The study: settings from validation examples, every system on test examples, what it costs, the frontier's curves.

Each part is a list of runs in a file of JSON lines, so that it can be killed and taken up again at any point.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from reproductions.mini.experiment.cells import Cell
from reproductions.mini.experiment.costs import measure_costs
from reproductions.mini.experiment.methods import Method
from reproductions.mini.experiment.parallel import execute_all
from reproductions.mini.experiment.run import Run
from reproductions.mini.experiment.scores import h_scores, mean, rate_that_reaches, target_score
from reproductions.mini.experiment.systems import SYSTEMS, System, adapted
from reproductions.mini.experiment.tune import SEEDS as TUNING_SEEDS
from reproductions.mini.model.checkpoint import CHECKPOINTS, require_checkpoint
from reproductions.shared.results import Result, read_results

Stage = Literal["tune", "test", "frontier"]
STAGES = ("tune", "test", "cost", "frontier", "edge")
BATCH = 16
TEST_SEEDS = tuple(range(6))
FRONTIER_SEEDS = (0, 1)


@dataclass(frozen=True)
class Size:
    """How large the study is; smaller in tests.

    Attributes:
        steps: of every fine-tuning; None for the cell's.
        batch: examples a step.
        tuning_examples: validation examples a task.
        examples: test examples a task.
        own_examples: whether each test seed is measured by a draw of its own, and not all by one.
    """

    steps: int | None = None
    batch: int = BATCH
    tuning_examples: int = 150
    examples: int = 200
    own_examples: bool = False


def checkpoint_of(seed: int, architecture: str = "llava") -> Path:
    """Even seeds begin with the first pre-trained model of an architecture, odd ones with the second."""
    return CHECKPOINTS[architecture][seed % 2]


def require_known(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError for a name that is not among those known, listing them."""
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; there are {', '.join(known)}")


def require_test_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError for a seed that settings are chosen with."""
    for seed in seeds:
        if seed in TUNING_SEEDS:
            raise ValueError(f"seed {seed} is kept for choosing settings: no reported number may use it")


def require_checkpoints(cells: Sequence[Cell]) -> None:
    """Raise FileNotFoundError for a pre-trained model of these cells that is not there; it has the command for it."""
    for path in {checkpoint_of(seed, cell.architecture): None for cell in cells for seed in (0, 1)}:
        require_checkpoint(path)


def tuning_runs(cell: Cell, systems: Sequence[System], size: Size) -> list[Run]:
    """Every candidate of every system, on both tuning seeds, each once."""
    runs = [
        _run(method, cell, seed, size, "tune")
        for seed in TUNING_SEEDS
        for system in systems
        for method in system.candidates(cell.base, cell.rate)
        if system.grid
    ]
    return list({run.key: run for run in runs}.values())


def chosen(cell: Cell, system: System, size: Size, results: dict[str, Result]) -> Method:
    """The system with the settings that won on validation examples.

    Raises:
        ValueError: a candidate has no result yet.
    """
    if not system.grid:
        return adapted(system.method, cell.base, 1.0)
    candidates = system.candidates(cell.base, cell.rate)
    found = [_results_of(method, cell, size, results) for method in candidates]
    if system.choose in SYSTEMS:
        rival = chosen(cell, SYSTEMS[system.choose], size, results)
        wanted = mean(_results_of(rival, cell, size, results), target_score)
        rates = [method.learning_rate or 0.0 for method in candidates]
        rate = rate_that_reaches(rates, [mean(each, target_score) for each in found], wanted)
        return candidates[0].with_settings(learning_rate=rate)
    score = target_score if system.choose == "T" else lambda result: h_scores(result)["H"]
    best = max(zip(candidates, found, strict=True), key=lambda pair: mean(pair[1], score))[0]
    return best if system.times == 1 else adapted(best, cell.base, system.times)


def settled(cell: Cell, size: Size, results: dict[str, Result]) -> dict[str, Method]:
    """By name, the cell's systems whose settings can be chosen by now."""
    found = {}
    for system in SYSTEMS.values():
        try:
            found[system.name] = chosen(cell, system, size, results)
        except ValueError:
            continue
    return found


def test_runs(
    cell: Cell, systems: Sequence[System], seeds: Sequence[int], size: Size, tuned: dict[str, Result]
) -> list[Run]:
    """Every system with its chosen settings, seed by seed; what trains nothing once for each checkpoint."""
    require_test_seeds(seeds)
    return runs_of(cell, [chosen(cell, system, size, tuned) for system in systems], seeds, size)


def runs_of(cell: Cell, methods: Sequence[Method], seeds: Sequence[int], size: Size) -> list[Run]:
    """Tests of methods whose settings are chosen; what trains nothing once for each checkpoint and draw of examples."""
    runs = [
        replace(
            _run(method, cell, seed if method.learning_rate is not None else seed % 2, size, "test"),
            draw=seed + 1 if size.own_examples else 0,
        )
        for seed in seeds
        for method in methods
    ]
    return list({run.key: run for run in runs}.values())


def frontier_runs(cell: Cell, systems: Sequence[System], size: Size, tuned: dict[str, Result]) -> list[Run]:
    """The chosen settings with one of them varied. Nothing is selected by these, so they may see test examples."""
    runs = []
    for system in systems:
        if system.frontier is None:
            continue
        setting, values = system.frontier
        method = chosen(cell, system, size, tuned)
        for value in values:
            varied = value * cell.rate if setting == "learning_rate" else value
            point = method.with_settings(**{setting: varied})
            runs += [_run(point, cell, seed, size, "frontier") for seed in FRONTIER_SEEDS]
    return runs


def edge_runs(cell: Cell, systems: Sequence[System], size: Size, tuned: dict[str, Result]) -> list[Run]:
    """One value beyond each edge where settings were chosen by H, on validation examples. Nothing is chosen by it."""
    return [
        _run(method, cell, seed, size, "tune")
        for seed in TUNING_SEEDS
        for system in systems
        if system.grid and system.choose == "H"
        for method in system.beyond(chosen(cell, system, size, tuned), cell.base, cell.rate)
    ]


def study(
    folder: Path,
    cells: Sequence[Cell],
    names: Sequence[str],
    seeds: Sequence[int],
    stages: Sequence[str],
    size: Size,
    console: Console,
    workers: int | None = None,
) -> None:
    """Run what the folder does not hold yet; writes `tune.jsonl`, `test.jsonl`, `costs.jsonl` and `frontier.jsonl`.

    The core systems of every cell come first, cell by cell, then the others, then what the systems cost, then the
    frontiers, then what lies beyond the edges.

    Args:
        folder: for the results.
        cells: targets and base optimizers.
        names: systems; all of each cell if empty.
        seeds: test seeds.
        stages: which parts.
        size: how large.
        console: for progress.
        workers: processes; one a core by default.

    Raises:
        FileNotFoundError: a pre-trained model of the cells is not there.
        ValueError: an unknown system; a seed that settings are chosen with; a part without the one before it.
    """
    require_checkpoints(cells)
    require_known("system", names, SYSTEMS)
    require_test_seeds(seeds)
    parts = [
        (cell, [s for s in SYSTEMS.values() if s.core == core and (not names or s.name in names) and s.fits(cell)])
        for core in (True, False)
        for cell in cells
    ]
    for cell, systems in parts:
        if "tune" in stages and systems:
            console.print(f"settings, {cell.name}: {_names(systems)}", soft_wrap=True)
            needed = [*systems, *(SYSTEMS[s.choose] for s in systems if s.choose in SYSTEMS)]
            execute_all(tuning_runs(cell, needed, size), folder / "tune.jsonl", console, workers)
        if "test" in stages and systems:
            console.print(f"test, {cell.name}: {_names(systems)}", soft_wrap=True)
            runs = test_runs(cell, systems, seeds, size, read_results(folder / "tune.jsonl"))
            execute_all(runs, folder / "test.jsonl", console, workers)
    tuned = read_results(folder / "tune.jsonl")
    for cell in cells if "cost" in stages else ():
        methods, checkpoint = settled(cell, size, tuned), checkpoint_of(0, cell.architecture)
        measure_costs(folder, cell.name, cell.target, methods, size.batch, console, checkpoint)
    for cell, systems in parts if "frontier" in stages else ():
        console.print(f"frontier, {cell.name}: {_names(systems)}", soft_wrap=True)
        execute_all(frontier_runs(cell, systems, size, tuned), folder / "frontier.jsonl", console, workers)
    for cell, systems in parts if "edge" in stages else ():
        console.print(f"beyond the edges, {cell.name}: {_names(systems)}", soft_wrap=True)
        execute_all(edge_runs(cell, systems, size, tuned), folder / "tune.jsonl", console, workers)


def _names(systems: Sequence[System]) -> str:
    return ", ".join(system.name for system in systems)


def _run(method: Method, cell: Cell, seed: int, size: Size, stage: Stage) -> Run:
    tuning = stage == "tune"
    return Run(
        method,
        cell.target,
        "validation" if tuning else "test",
        seed,
        size.steps or cell.steps,
        size.tuning_examples if tuning else size.examples,
        checkpoint_of(seed, cell.architecture),
        size.batch,
        "study" if stage == "test" else "scores",
        cell.first,
        cell.reference,
    )


def _results_of(method: Method, cell: Cell, size: Size, results: dict[str, Result]) -> list[Result]:
    keys = [_run(method, cell, seed, size, "tune").key for seed in TUNING_SEEDS]
    missing = [key for key in keys if key not in results]
    if missing:
        raise ValueError(f"no tuning result of {method.name} in {cell.name} yet ({missing[0]}): run the stage 'tune'")
    return [results[key] for key in keys]

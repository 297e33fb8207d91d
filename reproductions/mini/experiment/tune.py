"""Choose each method's settings on validation examples and on seeds that no reported number uses."""

from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from reproductions.mini.experiment.methods import METHODS, Method
from reproductions.mini.experiment.parallel import execute_all
from reproductions.mini.experiment.run import Run
from reproductions.shared.results import Result

SEEDS = (100, 101)
# Four candidates a method, so that none is tuned harder than another.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "fine-tune": {"learning_rate": (3e-4, 5e-4, 1e-3, 2e-3)},
    "mdgd": {"learning_rate": (1e-3, 2e-3), "align": (3.0, 10.0)},
    "align": {"learning_rate": (1e-3, 2e-3), "align": (3.0, 10.0)},
    "anchor": {"learning_rate": (1e-3, 2e-3), "anchor": (3.0, 10.0)},
    "mdgd-gm": {"learning_rate": (5e-3, 1e-2), "align": (3.0, 10.0)},
    "step": {"learning_rate": (1e-3, 2e-3), "restore": (0.0, 0.05)},
}


def candidates(name: str) -> list[Method]:
    """The method with every combination of its grid."""
    grid = GRIDS[name]
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return [METHODS[name].with_settings(**combination) for combination in combinations]


def tune(
    folder: Path, names: list[str], target: str, steps: int, examples: int, console: Console
) -> dict[str, list[list[Result]]]:
    """Run every candidate with every seed, print the means, best H(P, T) first; resumes from `tune.jsonl`.

    Returns:
        for each method its candidates' results, one list a candidate, best first.
    """
    runs = [
        Run(method, target, "validation", seed, steps, examples)
        for seed in SEEDS
        for name in names
        for method in candidates(name)
    ]
    grouped: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for run, result in zip(runs, execute_all(runs, folder / "tune.jsonl", console), strict=True):
        grouped[run.method.name][str(run.method.settings)].append(result)
    ranked = {
        name: sorted(found.values(), key=lambda results: -fmean(r["H"] for r in results))
        for name, found in grouped.items()
    }
    table = Table(title=f"{target}, validation, mean of seeds {', '.join(map(str, SEEDS))}")
    for column in ("method", "settings", "H(P, T)", "T", "P", "P restricted", "effective rank", "seconds"):
        table.add_column(column, justify="left" if column in ("method", "settings") else "right")
    for name, choices in ranked.items():
        for results in choices:
            settings = ", ".join(f"{k} {v}" for k, v in results[0]["settings"].items())
            means = [fmean(r[k] for r in results) for k in ("H", "T", "P", "P_restricted")]
            rank, seconds = fmean(r["effective_rank"]["scenes"] for r in results), fmean(r["seconds"] for r in results)
            cells = [*(f"{m:.1f}" for m in means), f"{rank:.1f}", f"{seconds:.0f}"]
            table.add_row(name, settings, *cells, end_section=results is choices[-1])
    console.print(table)
    return ranked

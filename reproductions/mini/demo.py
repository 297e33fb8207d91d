"""The demo: fine-tune the small LLaVA with and without MDGD, and see what each still sees."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from reproductions.mini.experiment.methods import METHODS, PRETRAINED
from reproductions.mini.experiment.parallel import execute_all
from reproductions.mini.experiment.run import Run
from reproductions.mini.figures import draw_demo
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.shared.results import Result

# Settings are chosen on validation examples and seeds from 100 on; see `tune`.
TEST_SEEDS = range(100)


def runs(target: str, seeds: Sequence[int], steps: int, examples: int) -> list[Run]:
    """One run a method and seed, on test examples; the longest first, so that the cores finish together."""
    order = ("mdgd", "step", "align", "mdgd-gm", "fine-tune", "fine-tune-low")
    trained = [Run(METHODS[name], target, "test", seed, steps, examples) for seed in seeds for name in order]
    return [*trained, Run(PRETRAINED, target, "test", 0, 0, examples)]


def require_test_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError for a seed that settings may be chosen with."""
    for seed in seeds:
        if seed not in TEST_SEEDS:
            raise ValueError(f"seed {seed} is kept for choosing settings; take one below {TEST_SEEDS.stop}")


def demo(
    folder: Path, target: str, seeds: Sequence[int], steps: int, examples: int, console: Console
) -> dict[str, list[Result]]:
    """Run the demo; writes `results.jsonl`, `demo.json`, `demo.md` and `demo.png` to the folder.

    Returns:
        for each method its results, one a seed, in the order of `METHODS`.

    Raises:
        ValueError: a seed is one of those that settings are chosen with.
        FloatingPointError: a loss is not finite.
    """
    require_test_seeds(seeds)
    found: dict[str, list[Result]] = {name: [] for name in METHODS}
    wanted = runs(target, seeds, steps, examples)
    for run, result in zip(wanted, execute_all(wanted, folder / "results.jsonl", console), strict=True):
        if "failed" in result:
            raise FloatingPointError(result["failed"])
        found[run.method.name].append(result)
    scores = table(found, target)
    console.print(scores)
    if len(seeds) > 1:
        console.print(f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}")
    (folder / "demo.md").write_text(markdown(scores))
    (folder / "demo.json").write_text(json.dumps(found, indent=1))
    draw_demo(found, target, folder / "demo.png")
    console.print(f"wrote {folder / 'demo.png'} and {folder / 'demo.json'}", soft_wrap=True)
    return found


def table(found: Mapping[str, Sequence[Result]], target: str) -> Table:
    """Percentages of exact matches, with the restricted score behind a slash where it differs."""
    out = Table(title=f"fine-tuned on {target}: exact match of generated answers, % / restricted to the task's answers")
    out.add_column("")
    for results in found.values():
        out.add_column(results[0]["label"], justify="right")

    def row(name: str, cells: Iterable[str], section: bool = False) -> None:
        out.add_row(name, *cells, end_section=section)

    methods = list(found.values())
    for task in PRETRAINED_TASKS:
        row(task, (_score(results, task) for results in methods), section=task == list(PRETRAINED_TASKS)[-1])
    row(f"target: {target}", (_score(results, target) for results in methods))
    row("P, mean of the pre-trained", (f"{spread(r, 'P')} / {spread(r, 'P_restricted')}" for r in methods))
    row("Avg, target included", (spread(results, "Avg") for results in methods))
    row("H(P, T)", (spread(results, "H") for results in methods), section=True)
    for name in methods[0][0]["effective_rank"]:
        row(f"effective rank, {name}", (spread(results, "effective_rank", name) for results in methods))
    row("numbers trained", (f"{results[0]['trained']:,}" for results in methods))
    row("seconds of training", (f"{fmean(r['seconds'] for r in results):.0f}" for results in methods))
    return out


def markdown(scores: Table) -> str:
    """The same table for a text file."""
    columns = [[str(column.header), *map(str, column.cells)] for column in scores.columns]
    head, *rows = ["| " + " | ".join(cells) + " |" for cells in zip(*columns, strict=True)]
    return "\n".join([head, "|---|" + "---:|" * (len(columns) - 1), *rows]) + "\n"


def spread(results: Sequence[Result], *path: str) -> str:
    """Mean of a number over seeds and, where there are several, its standard deviation."""
    values = [cast(float, reduce(getitem, path, cast(Any, result))) for result in results]
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _score(results: Sequence[Result], task: str) -> str:
    exact = spread(results, "exact", task)
    if all(result["restricted"].get(task, result["exact"][task]) == result["exact"][task] for result in results):
        return exact
    return f"{exact} / {spread(results, 'restricted', task)}"

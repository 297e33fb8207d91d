"""The demo: fine-tune the small LLaVA with and without help, and see what each still sees, in a table and a figure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from reproductions.mini.experiment.methods import METHODS, PRETRAINED
from reproductions.mini.experiment.parallel import execute_all
from reproductions.mini.experiment.run import Run
from reproductions.mini.world.data import Example, pretrained_task_data
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.shared.results import Result

# Settings are chosen on validation examples and seeds from 100 on; see `tune`.
TEST_SEEDS = range(100)
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "zero-shot": "#999999",
    "fine-tune": "#D55E00",
    "fine-tune-low": "#E69F00",
    "mdgd": "#0072B2",
    "align": "#56B4E9",
    "mdgd-gm": "#CC79A7",
    "step": "#009E73",
    "anchor": "#7A4FBF",
}
ALWAYS = ("zero-shot", "fine-tune")
"""What forgetting is seen by."""
DEFAULT = (*ALWAYS, "fine-tune-low", "mdgd", "align", "anchor")
SHOWN = 4


def runs(target: str, seeds: Sequence[int], steps: int, examples: int, names: Sequence[str] = DEFAULT) -> list[Run]:
    """One run a method and seed, on test examples; the longest first, so that the cores finish together."""
    longest_first = ("mdgd", "step", "mdgd-gm", "align", "anchor", "fine-tune", "fine-tune-low")
    order = [name for name in longest_first if name in {*names, *ALWAYS}]
    trained = [Run(METHODS[name], target, "test", seed, steps, examples) for seed in seeds for name in order]
    return [*trained, Run(PRETRAINED, target, "test", 0, 0, examples)]


def require_test_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError for a seed that settings may be chosen with."""
    for seed in seeds:
        if seed not in TEST_SEEDS:
            raise ValueError(f"seed {seed} is kept for choosing settings; take one below {TEST_SEEDS.stop}")


def demo(
    folder: Path,
    target: str,
    seeds: Sequence[int],
    steps: int,
    examples: int,
    console: Console,
    names: Sequence[str] = DEFAULT,
) -> dict[str, list[Result]]:
    """Run the demo; writes `results.jsonl`, `demo.json`, `demo.md` and `demo.png` to the folder.

    Args:
        folder: for these; what `results.jsonl` holds is not run again.
        target: what is fine-tuned on.
        seeds: of the batches.
        steps: of each fine-tuning.
        examples: that measure each task.
        console: for progress and the table.
        names: of `METHODS`; those of `ALWAYS` come without being named.

    Returns:
        for each method its results, one a seed, in the order of `METHODS`.

    Raises:
        ValueError: a seed is one of those that settings are chosen with.
        FloatingPointError: a loss is not finite.
    """
    require_test_seeds(seeds)
    found: dict[str, list[Result]] = {name: [] for name in METHODS if name in {*names, *ALWAYS}}
    wanted = runs(target, seeds, steps, examples, names)
    for run, result in zip(wanted, execute_all(wanted, folder / "results.jsonl", console), strict=True):
        if "failed" in result:
            raise FloatingPointError(result["failed"])
        found[run.method.name].append(result)
    scores = table(found, target)
    console.print(scores)
    if len(seeds) > 1:
        console.print(f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}")
    told = comparison(found)
    if told:
        console.print(told, soft_wrap=True)
    (folder / "demo.md").write_text("\n".join([markdown(scores), *([told + "\n"] if told else [])]), encoding="utf-8")
    (folder / "demo.json").write_text(json.dumps(found, indent=1))
    draw_demo(found, target, folder / "demo.png")
    console.print(f"wrote {folder / 'demo.png'} and {folder / 'demo.json'}", soft_wrap=True)
    return found


def table(found: Mapping[str, Sequence[Result]], target: str) -> Table:
    """Percentages of exact matches, with the restricted score behind a slash where it differs."""
    out = Table(title=f"fine-tuned on {target}: exact match of generated answers, % / restricted to the task's answers")
    out.add_column("")
    for name in found:
        out.add_column(METHODS[name].label, justify="right")

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
    times = [[r.get("processor_seconds", None if r["trained"] else 0.0) for r in results] for results in methods]
    if None not in {time for of_method in times for time in of_method}:
        row("processor seconds of training", (f"{fmean(cast(Any, of_method)):.0f}" for of_method in times))
    return out


def comparison(found: Mapping[str, Sequence[Result]]) -> str:
    """What the anchor has more than αv on the same seeds; empty without both."""
    if not {"anchor", "align"} <= found.keys():
        return ""
    pairs = list(zip(found["anchor"], found["align"], strict=True))
    measures = {"H": "H", "T": "T", "P": "P", "P_restricted": "P restricted"}
    more = {words: [a[name] - b[name] for a, b in pairs] for name, words in measures.items()}
    told = ", ".join(f"{words} {_signed(values)}" for words, values in more.items())
    sentence = f"The anchor against αv, on the same seed{'s' if len(pairs) > 1 else ''}: {told}."
    if len(pairs) == 1:
        return sentence
    return f"{sentence} All seeds are measured by the same examples: ± is a standard deviation, and of training alone."


def _signed(differences: Sequence[float]) -> str:
    return f"{fmean(differences):+.1f}" + (f" ± {stdev(differences):.1f}" if len(differences) > 1 else "")


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
    if all(_restricted(result, task) == result["exact"][task] for result in results):
        return exact
    return f"{exact} / {spread(results, 'restricted', task)}"


def _restricted(result: Result, task: str | None) -> float:
    """The score among the task's own answers, None for the mean; of free text there is none but the exact one."""
    return float(result["P_restricted"] if task is None else result["restricted"].get(task, result["exact"][task]))


def draw_demo(found: Mapping[str, Sequence[Result]], target: str, path: Path) -> None:
    """Draw pictures with answers above, scores and effective ranks below.

    Args:
        found: results of the pre-trained model first, then of every method, one a seed. Bars are means over seeds;
            answers are the first seed's.
        target: the task that they were fine-tuned on.
        path: PNG to write.
    """
    figure = plt.figure(figsize=(12, 7))
    results = [seeds[0] for seeds in found.values()]
    widths = (1.5, 1) * SHOWN
    pictures = figure.add_gridspec(
        1, 2 * SHOWN, left=0.05, right=0.99, top=0.88, bottom=0.61, wspace=0.05, width_ratios=widths
    )
    below = figure.add_gridspec(1, 2, width_ratios=(4.2, 1), left=0.05, right=0.97, top=0.49, bottom=0.11, wspace=0.28)
    for place, (example, answers) in enumerate(telling_examples(results, SHOWN)):
        picture, text = (figure.add_subplot(pictures[0, 2 * place + side]) for side in range(2))
        _answers(picture, text, example, answers, results)
    _bars(figure.add_subplot(below[0, 0]), found, target)
    _ranks(figure.add_subplot(below[0, 1]), found)
    figure.suptitle(f"What is forgotten by fine-tuning on {target}, and what is saved", fontsize=13)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _answers(picture: Axes, text: Axes, example: Example, answers: Sequence[str], results: Sequence[Result]) -> None:
    picture.imshow(example.picture.transpose(1, 2, 0))
    picture.set_title(example.question, fontsize=9.5, loc="left")
    for axis in (picture, text):
        axis.set_axis_off()
    for line, (result, answer) in enumerate(zip(results, answers, strict=True)):
        right = answer == example.answer
        text.text(
            0.02, 0.9 - 0.14 * line, f"{'✓' if right else '✗'} {answer or '(nothing)'}",
            color=COLOURS[result["method"]], fontsize=10, fontweight="bold" if right else "normal", va="center",
        )  # fmt: skip


def telling_examples(results: Sequence[Result], count: int) -> list[tuple[Example, list[str]]]:
    """Test examples, from different tasks, that the pre-trained model answers rightly and plain fine-tuning wrongly.

    Picked for that, so they show what forgetting looks like, not how often it happens. The first of each task; tasks
    in the order of their loss.
    """
    plain = next(r for r in results if r["method"] == "fine-tune")
    tasks = sorted(PRETRAINED_TASKS, key=lambda task: plain["exact"][task] - results[0]["exact"][task])
    found: list[tuple[Example, list[str]]] = []
    for task in tasks:
        data = pretrained_task_data(task, "test", len(plain["answers"][task]))
        for i, example in enumerate(data.examples):
            if results[0]["answers"][task][i] == example.answer != plain["answers"][task][i]:
                found.append((example, [r["answers"][task][i] for r in results]))
                break
    rest = pretrained_task_data(tasks[0], "test", count)
    for i in range(count - len(found)):
        found.append((rest.examples[i], [r["answers"][tasks[0]][i] for r in results]))
    return found[:count]


def _bars(axis: Axes, found: Mapping[str, Sequence[Result]], target: str) -> None:
    columns: list[tuple[str, str | None]] = [(task, task) for task in PRETRAINED_TASKS]
    columns += [("mean of\nthe seven", None), (f"target:\n{target}", target)]
    width = 0.8 / len(found)
    for i, (method, results) in enumerate(found.items()):
        places = [column + (i - (len(found) - 1) / 2) * width for column in range(len(columns))]
        scores = [[r["P"] if task is None else r["exact"][task] for r in results] for _, task in columns]
        among = [[_restricted(r, task) for r in results] for _, task in columns]
        axis.bar(places, [fmean(s) for s in among], width, color=COLOURS[method], alpha=0.3)
        axis.bar(places, [fmean(s) for s in scores], width, label=METHODS[method].label, color=COLOURS[method])
        if len(results) > 1:
            points = [(place, score) for place, seeds in zip(places, scores, strict=True) for score in seeds]
            axis.plot(*zip(*points, strict=True), ".", color="0.2", markersize=2.5)
    axis.set_xticks(range(len(columns)), [name for name, _ in columns])
    axis.axvline(len(PRETRAINED_TASKS) - 0.5, color="0.7", linewidth=0.8)
    axis.set_ylabel("right answers, %")
    axis.set_xlabel(
        "solid: generated answers; pale: the likeliest of the task's own answers, sight without form", fontsize=9
    )
    axis.set_ylim(0, 101)
    axis.legend(
        ncols=len(found), loc="lower left", bbox_to_anchor=(-0.04, 1.02), frameon=False, columnspacing=1.2,
        handlelength=1.2, fontsize=9.5,
    )  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)


def _ranks(axis: Axes, found: Mapping[str, Sequence[Result]]) -> None:
    ranks = [fmean(r["effective_rank"]["scenes"] for r in results) for results in found.values()]
    axis.barh(range(len(found)), ranks, color=[COLOURS[method] for method in found])
    axis.set_yticks(range(len(found)), [METHODS[name].label for name in found])
    axis.invert_yaxis()
    axis.bar_label(axis.containers[0], fmt="%.1f", padding=3)  # type: ignore[arg-type]
    axis.set_title("effective rank of the\nvisual features, scenes", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)

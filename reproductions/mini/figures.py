"""The demo's figure: what each model still answers, task by task, and the rank of its visual features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from reproductions.mini.world.data import Example, pretrained_task_data
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.shared.results import Result

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "zero-shot": "#999999",
    "fine-tune": "#D55E00",
    "fine-tune-low": "#E69F00",
    "mdgd": "#0072B2",
    "align": "#56B4E9",
    "mdgd-gm": "#CC79A7",
    "step": "#009E73",
}
SHOWN = 4


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
    below = figure.add_gridspec(1, 2, width_ratios=(4.2, 1), left=0.05, right=0.97, top=0.49, bottom=0.07, wspace=0.28)
    for place, (example, answers) in enumerate(telling_examples(results, SHOWN)):
        picture, text = (figure.add_subplot(pictures[0, 2 * place + side]) for side in range(2))
        _answers(picture, text, example, answers, results)
    _scores(figure.add_subplot(below[0, 0]), found, target)
    _ranks(figure.add_subplot(below[0, 1]), found)
    figure.suptitle(f"What is forgotten by fine-tuning on {target}, and what MDGD saves", fontsize=13)
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


def _scores(axis: Axes, found: Mapping[str, Sequence[Result]], target: str) -> None:
    columns: list[tuple[str, str | None]] = [(task, task) for task in PRETRAINED_TASKS]
    columns += [("mean of\nthe seven", None), (f"target:\n{target}", target)]
    width = 0.8 / len(found)
    for i, (method, results) in enumerate(found.items()):
        places = [column + (i - (len(found) - 1) / 2) * width for column in range(len(columns))]
        scores = [[r["P"] if task is None else r["exact"][task] for r in results] for _, task in columns]
        axis.bar(places, [fmean(s) for s in scores], width, label=results[0]["label"], color=COLOURS[method])
        if len(results) > 1:
            points = [(place, score) for place, seeds in zip(places, scores, strict=True) for score in seeds]
            axis.plot(*zip(*points, strict=True), ".", color="0.2", markersize=2.5)
    axis.set_xticks(range(len(columns)), [name for name, _ in columns])
    axis.axvline(len(PRETRAINED_TASKS) - 0.5, color="0.7", linewidth=0.8)
    axis.set_ylabel("right answers, %")
    axis.set_ylim(0, 101)
    axis.legend(
        ncols=len(found), loc="lower left", bbox_to_anchor=(-0.04, 1.02), frameon=False, columnspacing=1.2,
        handlelength=1.2, fontsize=9.5,
    )  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)


def _ranks(axis: Axes, found: Mapping[str, Sequence[Result]]) -> None:
    ranks = [fmean(r["effective_rank"]["scenes"] for r in results) for results in found.values()]
    axis.barh(range(len(found)), ranks, color=[COLOURS[method] for method in found])
    axis.set_yticks(range(len(found)), [results[0]["label"] for results in found.values()])
    axis.invert_yaxis()
    axis.bar_label(axis.containers[0], fmt="%.1f", padding=3)  # type: ignore[arg-type]
    axis.set_title("effective rank of the\nvisual features, scenes", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)

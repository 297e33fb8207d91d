"""The frontier: target score against what is kept, so that a method that only learns less does not look better."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reproductions.mini.experiment.outcomes import SCORES, CellOutcomes
from reproductions.mini.experiment.scores import mean
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.report.labels import label_points
from reproductions.mini.report.opening import SHOWN
from reproductions.mini.report.verdicts import FEWEST_SEEDS
from reproductions.shared.figures import label
from reproductions.shared.results import Result
from reproductions.shared.stats import estimate

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_FAMILIES = {
    "no visual gradient": (
        "#B84A00", ("fine-tune", "fine-tune-low", "fine-tune-matched", "fine-tune-tenth", "lora", "l2-sp", "lora-all",
         "lora-all-4", "lora-all-64", "lora-l2", "lora-laplace", "lora-mask-target", "corda", "osf", "spider",
         "attention", "gate-up", "eaft", "dft", "mofo", "kl", "kl-random"),
    ),
    "after training": (
        "#6B4A2E", ("model-tailor", "model-tailor-keep", "wise-ft", "wise-align", "wise-anchor", "dare", "dg-hard"),
    ),
    "in the gradient": (
        "#0072B2", ("mdgd", "align", "project", "no-align", "budget", "reference", "global", "lazy", "lazy-4",
         "lazy-16", "align-middle", "lora-align"),
    ),
    "anchor": (
        "#7A6A00", ("anchor", "anchor-questions", "anchor-own", "anchor-running", "anchor-image", "anchor-all",
         "anchor-2", "anchor-whole", "anchor-lazy", "lora-anchor"),
    ),
    "in the step": ("#00805C", ("step", "history", "restore", "inputs", "inputs-projector")),
    "10 % of the numbers": (
        "#A8488A", ("mdgd-gm", "random", "random-align", "magnitude", "magnitude-align", "model-dowser"),
    ),
    "old examples or questions": (
        "#222222", ("replay", "replay-1", "replay-5", "replay-10", "self-replay", "self-replay-random",
         "kl-questions", "lora-laplace-old", "corda-old"),
    ),
}  # fmt: skip
FAMILY_COLOURS = {name: colour for colour, names in _FAMILIES.values() for name in names}
_FAR = 12.0
"""Systems whose H lies so many points below the best's are named beside the frontier, which they would flatten."""
_MANY = 24
"""Of more systems than this not all are named."""
_BASELINE = "fine-tune-low"
"""What the others are held against is shown however far it is."""


def draw_frontier(cell: CellOutcomes) -> Figure | None:
    """Target score against what is kept: tests at the chosen settings on the left, settings varied on the right."""
    points = {
        name: (estimate(list(outcome.values("T").values())), estimate(list(outcome.values("P").values())))
        for name, outcome in cell.systems.items()
        if name != "zero-shot"
    }
    curves, source = _varied(cell)
    if not points and not curves:
        return None
    best = max((_h(T.mean, P.mean) for T, P in points.values()), default=0.0)
    near = {
        name: pair for name, pair in points.items() if name == _BASELINE or _h(pair[0].mean, pair[1].mean) > best - _FAR
    }
    # Where not all can be named, what has most of H comes first.
    near = dict(sorted(near.items(), key=lambda item: -_h(item[1][0].mean, item[1][1].mean)))
    far = [f"{SYSTEMS[n].marked} ({T.mean:.0f}, {P.mean:.0f})" for n, (T, P) in points.items() if n not in near]
    outside = textwrap.wrap(f"outside (T, P): {', '.join(far)}", 200, break_on_hyphens=False) if far else []
    if len(near) > _MANY:
        outside.append(f"Where points lie close, the tables alone name some of these {len(near)}.")
    # In inches, so that the names below have room however many they are.
    below, height, above = 0.95 + 0.15 * len(outside), 4.6, 0.9
    whole = below + height + above
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, whole))
    figure.subplots_adjust(left=0.055, right=0.985, top=1 - above / whole, bottom=below / whole, wspace=0.13)
    for name, (T, P) in near.items():
        # Of two seeds the interval is wider than the figure, and says no more than that they are two.
        halves = {"xerr": T.half, "yerr": P.half} if P.n >= FEWEST_SEEDS else {}
        left.errorbar(T.mean, P.mean, **halves, fmt="none", ecolor=FAMILY_COLOURS[name], elinewidth=0.8, alpha=0.35)
        left.plot(T.mean, P.mean, "o", color=FAMILY_COLOURS[name], markersize=6)
    # Candidates differ in two settings, which make no curve.
    style = "-" if cell.frontier else ""
    for i, (name, line) in enumerate(curves.items()):
        right.plot(
            *zip(*line, strict=True), linestyle=style, marker="osD^vP"[i % 6], color=FAMILY_COLOURS[name],
            markersize=4.5, linewidth=1.2, alpha=0.85,
        )  # fmt: skip
    sure = [(T, P) for T, P in near.values() if P.n >= FEWEST_SEEDS]
    ends = [(T.mean + side * T.half, P.mean + side * P.half) for T, P in sure for side in (-1, 1)]
    means = [(T.mean, P.mean) for T, P in near.values()]
    _frontier_axis(left, "test, chosen settings, with 95 % intervals over seeds", [*means, *ends])
    _frontier_axis(right, source, [point for line in curves.values() for point in line])
    _pretrained_line(cell, left)
    left.legend(
        handles=[Line2D([], [], marker="o", linestyle="", color=colour, label=family)
                 for family, (colour, names) in _FAMILIES.items() if set(names) & {*points, *curves}],
        ncols=7, loc="lower left", bbox_to_anchor=(0, -0.18), frameon=False, fontsize=9, handletextpad=0.2,
    )  # fmt: skip
    figure.text(0.055, 0.08 / whole, "\n".join(outside), fontsize=8, color="0.35", linespacing=1.1)
    figure.suptitle(f"Learned against kept: {cell.title}")
    figure.canvas.draw()
    label_points(
        left, [(T.mean, P.mean) for T, P in near.values()], [SYSTEMS[n].marked for n in near],
        [FAMILY_COLOURS[n] for n in near], sure=named_in_any_case(near),
    )  # fmt: skip
    last = {
        name: _end(line, right) if cell.frontier else max(line, key=lambda p: _h(*p)) for name, line in curves.items()
    }
    label_points(
        right, list(last.values()), [SYSTEMS[n].marked for n in last], [FAMILY_COLOURS[n] for n in last],
        avoid=[point for line in curves.values() for point in line],
    )  # fmt: skip
    return figure


def named_in_any_case(names: Collection[str]) -> list[bool]:
    """Whether each of these systems is: of many those of the page's first picture, which a reader looks for."""
    return [name in SHOWN or len(names) <= _MANY for name in names]


def _varied(cell: CellOutcomes) -> tuple[dict[str, list[tuple[float, float]]], str]:
    """Points (T, P) by system, and what they are: the frontier's runs, or the candidates if there are none."""
    if cell.frontier:
        groups = {name: list(found.values()) for name, (_, found) in cell.frontier.items()}
        return _means(groups), "test, one setting varied (each curve ends at its highest value)"
    groups = {name: [results for _, results in found] for name, found in cell.tuning.items() if SYSTEMS[name].frontier}
    return _means(groups), "validation, the candidates that settings were chosen from"


def _means(groups: Mapping[str, Sequence[Sequence[Result]]]) -> dict[str, list[tuple[float, float]]]:
    return {
        name: [(mean(results, SCORES["T"]), mean(results, SCORES["P"])) for results in line]
        for name, line in groups.items()
        if line
    }


def _end(line: Sequence[tuple[float, float]], axis: Axes) -> tuple[float, float]:
    """The last point of a curve that can be seen."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    seen = [(T, P) for T, P in line if left <= T <= right and bottom <= P <= top]
    return (seen or line)[-1]


def _h(T: float, P: float) -> float:
    return 2 * T * P / (T + P) if T + P else 0.0


def _frontier_axis(axis: Axes, title: str, points: Sequence[tuple[float, float]]) -> None:
    label(axis, title, "target score T, %", "kept of the pre-trained tasks P, %")
    axis.grid(alpha=0.2)
    if not points:
        axis.text(0.5, 0.5, "not measured yet", ha="center", transform=axis.transAxes, color="0.5")
        return
    best = max(_h(*point) for point in points)
    near = np.array([point for point in points if _h(*point) > best - 2 * _FAR])
    for set_limits, values in ((axis.set_xlim, near[:, 0]), (axis.set_ylim, near[:, 1])):
        room = max(1.0, 0.12 * float(np.ptp(values)))
        set_limits(values.min() - room, min(101.0, values.max() + room))
    _equal_h(axis)


def _equal_h(axis: Axes) -> None:
    """Lines of equal H(P, T), so that one sees what a point of the one is worth in the other."""
    T, P = np.meshgrid(*(np.linspace(*limits, 80).clip(0.1) for limits in (axis.get_xlim(), axis.get_ylim())))
    lines = axis.contour(T, P, 2 * T * P / (T + P), levels=7, colors="0.85", linewidths=0.7, zorder=0)
    axis.clabel(lines, fmt="H %g", fontsize=6.5, colors="0.65")


def _pretrained_line(cell: CellOutcomes, axis: Axes) -> None:
    if "zero-shot" in cell.systems:
        P = fmean(cell.systems["zero-shot"].values("P").values())
        axis.axhline(P, color="0.6", linewidth=0.8, linestyle="--")
        axis.annotate(f"pre-trained {P:.1f}", (0.01, P), xycoords=("axes fraction", "data"), fontsize=8, color="0.5",
                      va="top", xytext=(0, -2), textcoords="offset points", annotation_clip=True)  # fmt: skip

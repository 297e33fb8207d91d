"""Figures 1 to 5, drawn from what runs left on disk."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reproductions.paper.data import DATASETS
from reproductions.paper.report.analysis import Kind, curve, embed, masking, ranks
from reproductions.paper.report.published import PublishedExperiment, published
from reproductions.paper.report.results import Result, read_results
from reproductions.shared.figures import grid, label, legend_entries, save

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"zero-shot": "#999999", "fine-tune": "#D55E00", "mdgd": "#0072B2", "mdgd-gm": "#56B4E9"}
LABELS = {"zero-shot": "pre-trained", "fine-tune": "fine-tuned", "mdgd": "MDGD", "mdgd-gm": "MDGD-GM"}
WIDTH = 11.0
"""Inches, of every figure: letters are then of one size where figures are shown below each other."""
LLAVA, MINICPM = ("llava-flickr30k", "llava-okvqa"), ("minicpm-pathvqa", "minicpm-textcaps")

Runs = Mapping[str, Mapping[str, Result]]


def draw_all(results: Path, output: Path) -> list[Path]:
    """Draw every figure that the results have data for.

    Args:
        results: folder of all runs.
        output: folder for `figure1.png` to `figure5.png`; made if it is not there.

    Returns:
        the files written, in order; a figure without data is not among them.

    Raises:
        FileError: the results cannot be read.
    """
    runs = read_results(results)
    drawings: dict[str, Callable[[Runs], Figure | None]] = {
        "figure1": draw_ranks_before_and_after,
        "figure2": lambda found: draw_features(found, MINICPM),
        "figure3": draw_training,
        "figure4": draw_ranks,
        "figure5": lambda found: draw_features(found, LLAVA),
    }
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in drawings.items():
        figure = draw(runs)
        if figure is None:
            continue
        written.append(save(figure, output / f"{name}.png"))
    return written


def draw_ranks_before_and_after(runs: Runs) -> Figure | None:
    """Figure 1: effective rank of the visual features before and after fine-tuning."""
    return _rank_panels(runs, ("zero-shot", "fine-tune"), "Effective rank before and after instruction tuning")


def draw_ranks(runs: Runs) -> Figure | None:
    """Figure 4: the same with MDGD; (a) LLaVA, (b) MiniCPM."""
    title = "Effective rank of the last hidden layer at image tokens"
    return _rank_panels(runs, ("zero-shot", "fine-tune", "mdgd"), title)


def draw_features(runs: Runs, names: Sequence[str]) -> Figure | None:
    """Figures 2 and 5: t-SNE of multimodal and visual features, a row for each experiment."""
    methods: tuple[str, ...] = ("zero-shot", "fine-tune", "mdgd")
    kinds: tuple[Kind, ...] = ("multimodal", "visual")
    panels = []
    for name in names:
        placed = {kind: embed(runs.get(name, {}), methods, published()[name].target, kind) for kind in kinds}
        panels += [(name, kind, found) for kind, found in placed.items() if found is not None]
    if not panels:
        return None
    figure, axes = _grid(len(panels), 2, 4.2)
    for axis, letter, (name, kind, found) in zip(axes, "abcd", panels, strict=False):
        for method, points in found.points.items():
            area = min(36.0, max(9.0, 900 / len(points)))
            axis.scatter(
                points[:, 0], points[:, 1], area, alpha=0.65, linewidths=0, color=COLOURS[method], label=LABELS[method]
            )
        token = "last image token" if kind == "visual" else "last instruction token"
        axis.set_title(f"({letter}) {DATASETS[published()[name].target].title}, {kind}: {token}", fontsize=10)
        _mark(axis, runs[name])
        axis.set_xticks([])
        axis.set_yticks([])
    _legend(figure)
    model = published()[names[0]].model
    figure.suptitle(f"t-SNE of features of {model} on its target task", fontsize=12)
    return figure


def draw_training(runs: Runs) -> Figure | None:
    """Figure 3: (a) learning curves, (b) cos(g̃, g̃₀) and (c) L_v against the masking ratio; a row an experiment."""
    methods = ("fine-tune", "mdgd", "mdgd-gm")
    rows = []
    for name, experiment in published().items():
        mine = runs.get(name, {})
        curves = {m: curve(mine[m]) for m in methods if m in mine}
        curves = {method: found for method, found in curves.items() if len(found[0])}
        ratios = masking(mine)
        if curves or ratios:
            rows.append((experiment, curves, ratios))
    if not rows:
        return None
    figure, panels = _grid(3 * len(rows), 3, 3.1)
    axes = [panels[i : i + 3] for i in range(0, len(panels), 3)]
    for (left, middle, right), (experiment, curves, ratios) in zip(axes, rows, strict=True):
        for method, (steps, losses, smooth) in curves.items():
            left.plot(steps, losses, color=COLOURS[method], alpha=0.25, linewidth=0.8)
            left.plot(steps, smooth, color=COLOURS[method], label=LABELS[method], linewidth=1.8)
        if curves:
            left.legend(frameon=False)
        label(left, f"(a) {_place(experiment)}", "optimizer step", "task loss")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        _mark(left, runs[experiment.name])
        for axis, key, letter, what in ((middle, "cos", "b", "cos(g̃, g̃₀)"), (right, "visual_loss", "c", "$L_v$")):
            label(axis, f"({letter}) {_place(experiment)}", "numbers that may move, %", what)
            _mark(axis, runs[experiment.name])
            if ratios:
                axis.plot(100 * ratios["ratio"], ratios[key], "o-", color=COLOURS["mdgd-gm"], markersize=4)
            else:
                axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="0.5")
    figure.suptitle("Learning curves, and MDGD-GM against its masking ratio", fontsize=12)
    return figure


def _rank_panels(runs: Runs, methods: Sequence[str], title: str) -> Figure | None:
    panels = []
    for name, experiment in published().items():
        found = ranks(runs.get(name, {}), methods, experiment.pretrained)
        if len(found) > 1:
            panels.append((experiment, found))
    if not panels:
        return None
    figure, axes = _grid(len(panels), min(2, len(panels)), 3.2)
    for axis, (experiment, found) in zip(axes, panels, strict=False):
        width = 0.8 / len(found)
        for i, (method, values) in enumerate(found.items()):
            places = np.arange(len(values)) + (i - (len(found) - 1) / 2) * width
            axis.bar(places, values, width, color=COLOURS[method], label=LABELS[method])
        names = [DATASETS[task].title for task in experiment.pretrained]
        axis.set_xticks(range(len(names)), names, fontsize=8.5)
        letter = "a" if experiment.name in LLAVA else "b"
        label(axis, f"({letter}) {_place(experiment)}", "", "effective rank")
        _mark(axis, runs[experiment.name])
    _legend(figure)
    figure.suptitle(title, fontsize=12)
    return figure


def _grid(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure, axes = grid(count, (WIDTH / min(columns, count), height), columns)
    layout: Any = figure.get_layout_engine()
    # A title belongs to the panel below it, not to the one above.
    layout.set(h_pad=0.14, w_pad=0.1)
    return figure, axes


def _legend(figure: Figure) -> None:
    found = legend_entries(figure)
    labels = [text for text in LABELS.values() if text in found]
    handles = [found[text] for text in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, markerscale=1.5)


def _place(experiment: PublishedExperiment) -> str:
    return f"{experiment.model} on {DATASETS[experiment.target].title}"


def _mark(axis: Axes, runs: Mapping[str, Result]) -> None:
    """Say across the panel that it shows tiny random models, where it does."""
    if any(run.smoke for run in runs.values()):
        axis.text(0.5, 0.5, "SMOKE", transform=axis.transAxes, fontsize=42, color="black", alpha=0.16, ha="center",
                  va="center", rotation=18, zorder=10)  # fmt: skip

"""The study's figures: ranks, learning curves, gradients, masking ratios and t-SNE; all of them in one call."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproductions.mini.experiment.cells import TITLES
from reproductions.mini.experiment.embedding import EMBEDDED, KINDS
from reproductions.mini.experiment.finetune import TRACED_EVERY
from reproductions.mini.experiment.masking import FILE as MASKING_FILE
from reproductions.mini.experiment.outcomes import CellOutcomes
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.report.frontier import draw_frontier
from reproductions.mini.report.razor import draw_razor
from reproductions.mini.report.verdicts import FEWEST_SEEDS
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.shared.figures import grid, label, one_legend, save
from reproductions.shared.results import Result, read_lines
from reproductions.shared.stats import estimate

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "zero-shot": "#999999", "fine-tune": "#D55E00", "fine-tune-low": "#E69F00", "mdgd": "#0072B2",
    "align": "#56B4E9", "history": "#009E73", "inputs": "#8A9A00", "project": "#44397D", "mdgd-gm": "#CC79A7",
    "no-align": "#7A4B2A", "replay": "#222222", "anchor": "#7A4FBF",
}  # fmt: skip


def draw_figures(results: Path, cells: Sequence[CellOutcomes], output: Path) -> list[Path]:
    """Draw every figure that the results, or what `--tsne` and `--masking` left beside them, suffice for."""
    written = draw_study(cells, output)
    return [*written, *draw_masking(results, output), *draw_embeddings(results, output)]


def draw_study(cells: Sequence[CellOutcomes], output: Path) -> list[Path]:
    """Draw what the results suffice for: `frontier-<cell>.png`, and ranks, curves, gradients and razor.

    Args:
        cells: of `outcomes.load`.
        output: folder; made if it is not there.

    Returns:
        the files written.
    """
    output.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[], Figure | None]] = {
        f"frontier-{cell.cell.name}": partial(draw_frontier, cell) for cell in cells
    }
    drawings |= {
        "ranks": partial(draw_ranks, cells),
        "curves": partial(draw_curves, cells),
        "gradients": partial(draw_gradients, cells),
        "razor": partial(draw_razor, cells),
    }
    written = []
    for name, draw in drawings.items():
        figure = draw()
        if figure is not None:
            written.append(save(figure, output / f"{name}.png"))
    return written


def draw_ranks(cells: Sequence[CellOutcomes]) -> Figure | None:
    """Figures 1 and 4: effective rank of every task's visual features before and after fine-tuning."""
    shown = ("zero-shot", "fine-tune", "mdgd", "history", "anchor")
    cells = [c for c in cells if len(_measured(c, shown)) > 1]
    if not cells:
        return None
    figure, axes = grid(len(cells), (8.0, 3.3))
    for axis, cell in zip(axes, cells, strict=False):
        systems = _measured(cell, shown)
        tasks = (*PRETRAINED_TASKS, cell.cell.target)
        for i, name in enumerate(systems):
            runs = {seed: run for seed, run in cell.systems[name].runs.items() if "failed" not in run}
            found = [_rank_and_change(cell, runs, task) for task in tasks]
            axis.errorbar(
                np.arange(len(tasks)) + 0.7 * (i / len(systems) - 0.5), [rank for rank, _ in found],
                [change for _, change in found], fmt="o", color=COLOURS[name], markersize=5.5, elinewidth=1.2,
                label=SYSTEMS[name].label,
            )  # fmt: skip
        axis.set_xticks(range(len(tasks)), [*PRETRAINED_TASKS, f"target:\n{cell.cell.target}"], fontsize=8.5)
        axis.axvline(len(PRETRAINED_TASKS) - 0.5, color="0.7", linewidth=0.8)
        axis.grid(axis="y", alpha=0.2)
        label(axis, cell.title, "", "effective rank")
    figure.suptitle("Effective rank of the last hidden layer at image tokens; bars: 95 % interval of its change")
    one_legend(figure)
    return figure


def _rank_and_change(cell: CellOutcomes, runs: Mapping[int, Result], task: str) -> tuple[float, float]:
    """Mean rank, and half the interval of its change from the pre-trained model's; 0 for fewer than three seeds.

    The pre-trained models differ more from each other than training changes them, so ranks themselves vary too much.
    """
    before = cell.systems["zero-shot"].runs if "zero-shot" in cell.systems else {}
    both = runs.keys() & before.keys()
    change = estimate([runs[seed]["rank"][task] - before[seed]["rank"][task] for seed in both]) if both else None
    return fmean(run["rank"][task] for run in runs.values()), change.half if change and change.n >= FEWEST_SEEDS else 0


def draw_curves(cells: Sequence[CellOutcomes]) -> Figure | None:
    """Figure 3a: the task loss, means over seeds."""
    shown = ("fine-tune", "fine-tune-low", "mdgd", "align", "no-align", "mdgd-gm", "history", "inputs", "anchor")
    cells = [c for c in cells if _measured(c, shown)]
    if not cells:
        return None
    figure, axes = grid(len(cells), (7.0, 3.4))
    for axis, cell in zip(axes, cells, strict=False):
        for name in _measured(cell, shown):
            _line(axis, cell, name, lambda run: run["losses"])
        axis.set_yscale("log")
        label(axis, cell.title, "optimizer step", "task loss, mean of five steps")
    figure.suptitle("Learning curves")
    one_legend(figure)
    return figure


def draw_gradients(cells: Sequence[CellOutcomes]) -> Figure | None:
    """How the task's gradient lies to the visual and the reference's, and L_v, over the training."""
    shown = ("mdgd", "no-align", "align", "project", "mdgd-gm", "history")
    quantities = {
        "cos_task_reference": "cos(g̃, g̃₀)", "cos_task_visual": "cos(g, v)", "visual_to_task": "‖v‖ / ‖g‖",
        "visual_loss": "$L_v$ of the batch",
    }  # fmt: skip
    cells = [c for c in cells if any(_traced(c, name, q) for name in shown for q in quantities)]
    if not cells:
        return None
    figure, axes = plt.subplots(
        len(cells), len(quantities), figsize=(15, 3.1 * len(cells) + 0.7), squeeze=False, layout="constrained"
    )
    for row, cell in zip(axes, cells, strict=True):
        for axis, (quantity, words) in zip(row, quantities.items(), strict=True):
            for name in (n for n in shown if _traced(cell, n, quantity)):
                _line(axis, cell, name, lambda run, quantity=quantity: run["traces"][quantity])  # type: ignore[misc]
            if quantity.startswith("cos"):
                axis.axhline(0, color="0.7", linewidth=0.8)
            label(axis, f"{cell.title}: {words}", "optimizer step", "")
    figure.suptitle("What the gradients did during fine-tuning, means over seeds")
    one_legend(figure)
    return figure


def _line(axis: Axes, cell: CellOutcomes, name: str, values: Callable[[Result], Sequence[float]]) -> None:
    found = [values(run) for run in cell.systems[name].runs.values() if "failed" not in run]
    curve = np.mean([line[: min(map(len, found))] for line in found], axis=0)
    steps = TRACED_EVERY * (1 + np.arange(len(curve)))
    axis.plot(steps, curve, color=COLOURS[name], label=SYSTEMS[name].label, linewidth=1.4)


def _measured(cell: CellOutcomes, names: Sequence[str]) -> list[str]:
    return [n for n in names if n in cell.systems and any("failed" not in run for run in cell.systems[n].runs.values())]


def _traced(cell: CellOutcomes, name: str, quantity: str) -> bool:
    runs = cell.systems[name].runs.values() if name in cell.systems else ()
    return bool(runs) and all("failed" in run or quantity in run["traces"] for run in runs)


def draw_masking(results: Path, output: Path) -> list[Path]:
    """Draw `masking-<cell>.png` for every cell that `masking.jsonl` holds."""
    found: dict[str, list[dict]] = {}
    for line in read_lines(results / MASKING_FILE):
        found.setdefault(line["cell"], []).append(line)
    output.mkdir(parents=True, exist_ok=True)
    return [_masking(cell, lines, output / f"masking-{cell}.png") for cell, lines in found.items()]


def _masking(cell: str, lines: Sequence[dict], path: Path) -> Path:
    figure, axes = grid(2, (5.2, 3.0))
    ratios = sorted({line["ratio"] for line in lines})
    percent = [100 * ratio for ratio in ratios]
    words = {"cos": "cos(M ⊙ g̃, M ⊙ g̃₀)", "visual_loss": "$L_v$"}
    for axis, (quantity, name), letter in zip(axes, words.items(), "bc", strict=True):
        groups = [[line[quantity] for line in lines if line["ratio"] == ratio] for ratio in ratios]
        axis.plot(percent, [np.mean(group) for group in groups], "o-", color=COLOURS["mdgd-gm"], markersize=4)
        for at, group in zip(percent, groups, strict=True):
            axis.plot([at] * len(group), group, ".", color="0.3", markersize=3)
        label(axis, f"({letter}) {name}", "numbers that may move, %", "")
    figure.suptitle(f"MDGD-GM against its masking ratio: {TITLES[cell]}; line: mean, dots: seeds")
    return save(figure, path)


def draw_embeddings(results: Path, output: Path) -> list[Path]:
    """Draw every `tsne-<cell>.npz` of the results."""
    output.mkdir(parents=True, exist_ok=True)
    return [_embedding(path, output / f"{path.stem}.png") for path in sorted(results.glob("tsne-*.npz"))]


def _embedding(source: Path, path: Path) -> Path:
    placed = np.load(source)
    figure, axes = plt.subplots(1, len(KINDS), figsize=(10, 4.9), layout="constrained")
    for axis, (kind, token) in zip(axes, KINDS.items(), strict=True):
        for name in EMBEDDED:
            points = placed[f"{kind}/{name}"]
            # MDGD's may cover the pre-trained model's, which are therefore larger.
            size, alpha = (45, 0.45) if name == "zero-shot" else (10, 0.7)
            axis.scatter(*points.T, s=size, alpha=alpha, linewidths=0, color=COLOURS[name], label=SYSTEMS[name].label)
        label(axis, f"{kind}: {token}", "", "")
        axis.set_xticks([])
        axis.set_yticks([])
    title = TITLES[source.stem.removeprefix("tsne-")]
    figure.suptitle(f"t-SNE of features of the target's test examples: {title}, one seed")
    one_legend(figure)
    return save(figure, path)

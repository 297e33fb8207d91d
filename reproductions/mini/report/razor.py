"""RL's Razor (arXiv 2509.04259): does forgetting follow how far answers to the *new* task's prompts have moved?"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from reproductions.mini.experiment.outcomes import CellOutcomes
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.report.frontier import FAMILY_COLOURS
from reproductions.mini.report.labels import label_points
from reproductions.shared.figures import grid, label
from reproductions.shared.stats import spearman

FEWEST_SYSTEMS = 4
"""For Spearman's ρ and its interval."""

Diverged = Mapping[str, tuple[Mapping[int, float], float]]


def diverged(cell: CellOutcomes) -> Diverged:
    """By system whose runs hold it: KL by seed, and the mean change of P from the pre-trained model on these seeds."""
    before = cell.systems["zero-shot"].values("P") if "zero-shot" in cell.systems else {}
    found = {}
    for name, outcome in cell.systems.items():
        kl, P = outcome.values("KL"), outcome.values("P")
        both = sorted(kl.keys() & before.keys())
        if name != "zero-shot" and both:
            found[name] = {seed: kl[seed] for seed in both}, fmean(P[seed] - before[seed] for seed in both)
    return found


def correlation(found: Diverged) -> str:
    """Spearman's ρ over systems of mean KL and mean ΔP, in words."""
    if len(found) < FEWEST_SYSTEMS:
        return f"Of {len(found)} systems there is no correlation to speak of."
    rho = spearman(_points(found))
    if math.isnan(rho.rho):
        return f"Nothing varies over {len(found)} systems."
    return f"Spearman's ρ over {len(found)} systems: {rho}."


def draw_razor(cells: Sequence[CellOutcomes]) -> Figure | None:
    """KL on the new task against the change of P, a point a system; None where no cell holds two of them."""
    found = {cell.title: diverged(cell) for cell in cells}
    found = {title: each for title, each in found.items() if len(each) > 1}
    if not found:
        return None
    figure, axes = grid(len(found), (6.5, 4.2))
    for axis, (title, each) in zip(axes, found.items(), strict=False):
        for (kl, lost), name in zip(_points(each), each, strict=True):
            axis.plot(kl, lost, "o", color=FAMILY_COLOURS[name], markersize=5)
        axis.set_xscale("log")
        axis.margins(0.12)
        axis.grid(alpha=0.2)
        label(axis, f"{title}\n{correlation(each)}", "KL on the target's prompts, nats a token", "change of P, points")
    figure.suptitle("What was forgotten against how far answers to the new task moved")
    figure.canvas.draw()
    for axis, each in zip(axes, found.values(), strict=False):
        colours = [FAMILY_COLOURS[name] for name in each]
        label_points(axis, _points(each), [SYSTEMS[name].label for name in each], colours, size=7)
    return figure


def _points(found: Diverged) -> list[tuple[float, float]]:
    return [(fmean(kl.values()), lost) for kl, lost in found.values()]

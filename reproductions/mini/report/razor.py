"""RL's Razor (arXiv 2509.04259): does forgetting follow how far answers to the *new* task's prompts have moved?"""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from reproductions.mini.experiment.outcomes import CellOutcomes
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.report.divergence import correlation, diverged, points
from reproductions.mini.report.frontier import FAMILY_COLOURS, named_in_any_case
from reproductions.mini.report.labels import label_points
from reproductions.shared.figures import grid, label


def draw_razor(cells: Sequence[CellOutcomes]) -> Figure | None:
    """KL on the new task against the change of P, a point a system; None where no cell holds two of them."""
    found = {cell.title: diverged(cell) for cell in cells}
    found = {title: each for title, each in found.items() if len(each) > 1}
    if not found:
        return None
    figure, axes = grid(len(found), (6.5, 4.2))
    for axis, (title, each) in zip(axes, found.items(), strict=False):
        for (kl, lost), name in zip(points(each), each, strict=True):
            axis.plot(kl, lost, "o", color=FAMILY_COLOURS[name], markersize=5)
        kls = [kl for kl, _ in points(each)]
        if max(kls) > 3 * min(kls):
            axis.set_xscale("log")
        axis.margins(0.12)
        axis.grid(alpha=0.2)
        label(axis, f"{title}\n{correlation(each)}", "KL on the target's prompts, nats a token", "change of P, points")
    figure.suptitle("What was forgotten against how far answers to the new task moved")
    figure.canvas.draw()
    for axis, each in zip(axes, found.values(), strict=False):
        colours, sure = [FAMILY_COLOURS[name] for name in each], named_in_any_case(each)
        label_points(axis, points(each), [SYSTEMS[name].marked for name in each], colours, size=7, sure=sure)
    return figure

"""What the study's figures share: panels, their names, one legend, and how they are written."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> Path:
    """Write the figure and forget it."""
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def grid(count: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Panels in two columns, or one where there is one panel."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows + 0.8), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat)


def one_legend(figure: Figure) -> None:
    """A legend of all panels below them."""
    found = {}
    for axis in figure.axes:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(8, len(found)), frameon=False)


def label(axis: Axes, title: str, x: str, y: str) -> None:
    """Title, names of the axes, and no frame above and to the right."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)

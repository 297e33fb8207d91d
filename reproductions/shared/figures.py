"""What figures share: panels, their names, one legend, and how they are written."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_LEGEND_COLUMN = 1.9


def save(figure: Figure, path: Path) -> Path:
    """Write the figure and forget it."""
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def grid(count: int, size: tuple[float, float], columns: int = 2) -> tuple[Figure, list[Axes]]:
    """Panels of this size in so many columns, or fewer where there are fewer panels."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows + 0.8), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat)


def one_legend(figure: Figure) -> None:
    """A legend of all panels below them."""
    found = legend_entries(figure)
    columns = max(1, min(len(found), int(figure.get_figwidth() / _LEGEND_COLUMN)))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False)


def legend_entries(figure: Figure) -> dict[str, Artist]:
    """What stands for each label of all panels together."""
    found: dict[str, Artist] = {}
    for axis in figure.axes:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    return found


def label(axis: Axes, title: str, x: str, y: str) -> None:
    """Title, names of the axes, and no frame above and to the right."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)

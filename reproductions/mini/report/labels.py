"""Labels beside points of a plot, placed so that they cover neither each other nor the points nor other texts."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

_RADII = (7, 10, 13, 17, 21, 26, 31, 37, 43, 50, 57, 73)
_NEAR = _RADII[:4]
# Diagonals first: error bars are drawn along the axes.
_ANGLES = tuple(math.radians(angle) for angle in (30, 150, 330, 210, 60, 120, 300, 240, 90, 270, 0, 180))
_HALF_MARKER = 4.0
_LINE_FROM = 18


def label_points(
    axis: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colours: Sequence[str],
    avoid: Sequence[tuple[float, float]] = (),
    size: float = 8,
    sure: Sequence[bool] | None = None,
) -> None:
    """Write each text at the nearest free place to its point, with a thin line where that is not beside it.

    Args:
        axis: its limits, and the figure's layout, have to be final.
        points: in data coordinates.
        texts: one a point.
        colours: of the texts.
        avoid: other points that no text may cover.
        size: of the font, in points.
        sure: whether each is written in any case, as all are if None; the others come last, where there is room.
    """
    figure = axis.figure.get_figure(root=True)
    assert figure is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixels = figure.dpi / 72
    places = [axis.transData.transform(point) for point in points]
    reach = _HALF_MARKER * pixels
    covered = [*places, *(axis.transData.transform(point) for point in avoid)]
    taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in covered]
    taken += [text.get_window_extent(renderer) for text in axis.texts]
    every = [True] * len(texts) if sure is None else sure
    rows = zip(texts, points, places, colours, every, strict=True)
    for text, point, (x, y), colour, needed in sorted(rows, key=lambda row: not row[-1]):
        note = axis.annotate(text, point, fontsize=size, color=colour, ha="center", va="center")
        extent = note.get_window_extent(renderer)
        best: tuple[float, Bbox, int] | None = None
        for radius in _RADII if needed else _NEAR:
            for angle in _ANGLES:
                box = _beside(x, y, radius * pixels, angle, extent.width, extent.height)
                cost = sum(_overlap(box, other) for other in taken) + 3 * _outside(box, axis.bbox)
                if best is None or cost < best[0] - 1e-9:
                    best = cost, box, radius
            if best is not None and best[0] == 0:
                break
        assert best is not None
        box = best[1]
        note.remove()
        if best[0] > 0 and not needed:
            continue
        taken.append(box)
        centre = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        # The white outline keeps lines below a text from being read as part of its letters.
        axis.annotate(
            text, point, ((centre[0] - x) / pixels, (centre[1] - y) / pixels), textcoords="offset points",
            fontsize=size, color=colour, ha="center", va="center", arrowprops=line if best[2] >= _LINE_FROM else None,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip


def _beside(x: float, y: float, radius: float, angle: float, width: float, height: float) -> Bbox:
    """A box of this size whose nearest edge is about `radius` from the point, in this direction."""
    towards = math.cos(angle), math.sin(angle)
    x, y = x + towards[0] * (radius + width / 2), y + towards[1] * (radius + height / 2)
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _overlap(a: Bbox, b: Bbox) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)


def _outside(box: Bbox, frame: Bbox) -> float:
    inside = _overlap(box, frame)
    return max(0.0, box.width * box.height - inside)

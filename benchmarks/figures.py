"""The pictures of the tables."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.timing import Ratio


def bars(title: str, unit: str, series: Mapping[str, Mapping[str, Ratio | None]], log: bool = True) -> Figure:
    """Horizontal bars of medians, one colour a series; rows without a measurement stay empty."""
    rows = list(dict.fromkeys(row for values in series.values() for row in values))
    figure = Figure(figsize=(8, 1 + 0.28 * len(rows) * len(series)))
    axes = figure.add_subplot()
    height = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        found = [(row, values[row]) for row in rows if values.get(row) is not None]
        at = [rows.index(row) + i * height for row, _ in found]
        drawn = axes.barh(at, [x.median for _, x in found if x is not None], height, label=name)
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    axes.set_yticks([r + 0.4 - height / 2 for r in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title)
    axes.margins(x=0.15)
    if log:
        medians = [x.median for values in series.values() for x in values.values() if x is not None]
        axes.set_xscale("log")
        axes.set_xlim(left=min(1, *medians))
    if len(series) > 1:
        axes.legend(fontsize=8)
    return figure


def stacks(title: str, unit: str, rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """Horizontal bars, each the sum of its named parts."""
    figure = Figure(figsize=(8, 1.5 + 0.35 * len(rows)))
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    for part in next(iter(rows.values())):
        widths = [values[part] for values in rows.values()]
        axes.barh(list(rows), widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title)
    axes.legend(fontsize=8)
    return figure


def curves(title: str, x: str, y: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """One line a series, both axes logarithmic."""
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    for name, points in lines.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure

"""Small line charts as SVG."""

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 190, 44, 12, 14, 32


def lines(x: Sequence[float], series: Mapping[str, Sequence[float | None]], label: str, named: bool = True) -> str:
    """Series over common points, from zero up.

    Args:
        x: in rising order.
        series: by name, which is the class that its line is styled by; None where there is no number.
        label: of the horizontal axis.
        named: whether to write the names of series.
    """
    values = [y for ys in series.values() for y in ys if y is not None and math.isfinite(y)]
    top = _round_up(max([*values, 0.0]))
    first, last = x[0], x[-1] if x[-1] > x[0] else x[0] + 1

    def place(a: float, b: float) -> tuple[float, float]:
        across = LEFT + (a - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - b / top * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for share in (0.0, 0.5, 1.0):
        y = place(first, share * top)[1]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_short(share * top)}</text>')
    for at in dict.fromkeys((x[0], x[len(x) // 2], x[-1])):
        parts.append(f'<text x="{place(at, 0)[0]}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{at:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{html.escape(label)}</text>')
    for i, (name, ys) in enumerate(series.items()):
        points = [place(a, b) for a, b in zip(x, ys, strict=True) if b is not None and math.isfinite(b)]
        if len(points) > 1:
            joined = " ".join(f"{a},{b}" for a, b in points)
            parts.append(f'<polyline class="{name}" points="{joined}"/>')
        parts += [f'<circle class="{name}" cx="{a}" cy="{b}" r="2.5"/>' for a, b in points]
        if named:
            parts.append(f'<text class="{name}" x="{LEFT + 8 + 60 * i}" y="{TOP - 3}">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _short(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _round_up(x: float) -> float:
    """The next number that is 1, 2, 2.5 or 5 times a power of ten; 1 for 0."""
    if x <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(x))
    return next(step * power for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * power >= x)

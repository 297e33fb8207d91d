"""Time against n, for the update and for the mask; and how orthogonal the result is at each n."""

import math
import os
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from benchmarks import combine, figures, masking, naive
from benchmarks.report import Goal, Section, Table, mega, on
from benchmarks.settings import Settings
from benchmarks.setups import KINDS, Captured, gradients
from benchmarks.timing import COPY, NOTE, PATIENCE, Contender, Times, digits, ratio, threads
from torch_mdgd import Project

UPDATES = (combine.OURS, combine.NAIVE)
MASKS = (masking.OURS, masking.PARTITION)
# Vectors of n float32 that the rows hold at their worst moment; and numbers up to which there is a naive form.
VECTORS = 7
LARGEST_NAIVE = 16_000_000
# The largest number whose orthogonality is measured.
LARGE = 64_000_000


def slope(points: Sequence[tuple[int, float]]) -> float:
    """The exponent p of the least-squares fit time = c · n^p."""
    x = [math.log(n) for n, _ in points]
    y = [math.log(t) for _, t in points]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def residual(g_tilde: Tensor, g: Tensor, v: Tensor) -> float:
    """|⟨g~, v⟩| / (‖g‖ ‖v‖), with inner products in float64."""
    dot, gg, vv = 0.0, 0.0, 0.0
    for chunk in zip(g_tilde.split(1 << 20), g.split(1 << 20), v.split(1 << 20), strict=True):
        t, x, y = (part.double() for part in chunk)
        dot, gg, vv = dot + float(t @ y), gg + float(x @ x), vv + float(y @ y)
    return abs(dot) / math.sqrt(gg * vv)


@cache
def residuals(n: int) -> tuple[float, float]:
    """The residual of the library's float32 projection, and of the naive one."""
    originals = gradients([(n,)])
    g, v = originals["task"][0], originals["visual"][0]
    projection = Captured(originals, rule=Project(align=0.0))
    projection.prepare()
    projection.combine()
    return residual(projection.work["task"][0], g, v), residual(naive.project(g, v), g, v)


def sizes(wanted: Sequence[int]) -> list[int]:
    """Those whose vectors fit into half of the machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return [n for n in wanted if 4 * n * VECTORS <= memory / 2]


def section(settings: Settings) -> Section:
    """Time both at each size, on the largest number of threads."""
    with threads(settings.threads[-1]):
        sweep = {n: settings.race(contenders(n)) for n in sizes(settings.sweep)}
        left = {n: residuals(n) for n in sweep if n <= LARGE}
    tables, goals = [], []
    for title, names in (("The update (6)-(9)", UPDATES), ("The top 10 %", MASKS)):
        rows = []
        for n, times in sweep.items():
            cells = [str(ratio(times, name) or "left out") for name in names]
            rows.append((mega(n), *cells, *(_throughput(times, name, n) for name in names)))
        tables.append(Table(title, ("n", *(f"{x}, copies" for x in names), *(f"{x}, values/s" for x in names)), rows))
        linear = slope(_points(sweep, names[0])) if len(sweep) > 1 else None
        goals.append(Goal(f"{title}: exponent p of time ~ n^p up to n = {mega(max(sweep))}", 1.1, linear, unit=""))
    largest = max(left)
    tables.append(
        Table(
            "⟨g~, v⟩ / (‖g‖ ‖v‖) of the float32 projection",
            ("n", "torch_mdgd", "written naively"),
            [(mega(n), f"{ours:.1e}", f"{naively:.1e}") for n, (ours, naively) in left.items()],
        )
    )
    goals.append(Goal(f"⟨g~, v⟩ / (‖g‖ ‖v‖), n = {mega(largest)}", 1e-6, left[largest][0], unit=""))
    about = (
        "In copies of n values, and the values per second that they came to on this machine, "
        f"{on(settings.threads[-1])}; np.partition uses one. Vectors that fit into the processor's cache have a "
        f"cheaper copy. The naive form stops at {mega(LARGEST_NAIVE)}: it takes more memory. {NOTE}"
    )
    lines = {name: [(n, 1e3 * t) for n, t in _points(sweep, name)] for name in (COPY, *UPDATES, *MASKS)}
    figure = figures.curves("Time against n", "n", "milliseconds", lines)
    return Section("scaling", "Scaling", about, tables, goals, figure)


def contenders(n: int) -> list[Contender]:
    """The rows of both tables, and the copy.

    Few vectors, to reach far: the copy goes into θ, each round's gradients are what the one before left, and v holds
    the scores.
    """
    originals = gradients([(n,)])
    update = Captured(originals, originals)
    # Before θ is written over, which would be warned of.
    update.prepare()
    theta = update.optimizer.parameters[0].detach()
    g, v, g0, v0 = (originals[kind][0] for kind in KINDS)
    found = [Contender(COPY, lambda: theta.copy_(v)), Contender(combine.OURS, update.combine, update.prepare)]
    if n <= LARGEST_NAIVE:
        found.append(Contender(combine.NAIVE, lambda: naive.mdgd(g, v, g0, v0), limit=PATIENCE))
    return [*found, *masking.of_scores(v, masking.FRACTION, MASKS)]


def _points(sweep: dict[int, Times], name: str) -> list[tuple[int, float]]:
    return [(n, _median(times[name])) for n, times in sweep.items() if name in times]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _throughput(times: Times, name: str, n: int) -> str:
    return f"{digits(n / _median(times[name]) / 1e6)} M" if name in times else "—"

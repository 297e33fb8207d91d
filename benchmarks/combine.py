"""The update: equations (6)-(9) of one large vector, and one projection alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import figures, naive
from benchmarks.peers import PEERS, TORCHJD_PCGRAD
from benchmarks.report import Goal, Section, Table, mega, on
from benchmarks.settings import Settings
from benchmarks.setups import Captured, gradients
from benchmarks.timing import NOTE, PATIENCE, Contender, Ratio, copy_of, median_ratio, ratio, threads
from torch_mdgd import Project

OURS, PROJECTION = "torch_mdgd, (6)-(9)", "torch_mdgd, one projection"
NAIVE, NAIVE_PROJECTION = "written naively, (6)-(9)", "written naively, one projection"
TWO, FOUR = (f"{TORCHJD_PCGRAD.name}, {rows} x n" for rows in (2, 4))
PEER_ROWS = {f"{peer.name}, 2 x n": (peer, 2) for peer in PEERS} | {FOUR: (TORCHJD_PCGRAD, 4)}
NAMES = (OURS, NAIVE, PROJECTION, NAIVE_PROJECTION, *PEER_ROWS)


def contenders(n: int, dtype: torch.dtype = torch.float32, names: Sequence[str] = NAMES) -> list[Contender]:
    """The named rows for vectors of n numbers, those of missing peers left out, and the copy that is their unit."""
    originals = gradients([(n,)], dtype)
    g, v, g0, v0 = (tensors[0] for tensors in originals.values())
    mdgd, projection = Captured(originals), Captured(originals, rule=Project())
    found = {
        OURS: Contender(OURS, mdgd.combine, mdgd.prepare),
        NAIVE: Contender(NAIVE, lambda: naive.mdgd(g, v, g0, v0), limit=PATIENCE),
        PROJECTION: Contender(PROJECTION, projection.combine, projection.prepare),
        NAIVE_PROJECTION: Contender(NAIVE_PROJECTION, lambda: naive.project(g, v), limit=PATIENCE),
    }
    rivals = {name: row for name, row in PEER_ROWS.items() if name in names and row[0].installed}
    jacobian = torch.stack([g, v, g0, v0]) if rivals else torch.empty(0)
    for name, (peer, rows) in rivals.items():
        found[name] = Contender(name, _bind(peer.build(), jacobian[:rows]), limit=PATIENCE)
    return [copy_of(n), *(found[name] for name in names if name in found)]


def _bind(aggregate, jacobian: Tensor):
    return lambda: aggregate(jacobian)


def section(settings: Settings) -> Section:
    """Time all rows in float32, and in bfloat16 those that take it, on each number of threads."""
    series: dict[str, dict[str, Ratio | None]] = {}
    for count in settings.threads:
        for dtype, names in ((torch.float32, NAMES), (torch.bfloat16, (OURS, NAIVE, PROJECTION, NAIVE_PROJECTION))):
            with threads(count):
                times = settings.race(contenders(settings.values, dtype, names))
            label = f"{str(dtype).removeprefix('torch.')}, {on(count)}"
            series[label] = {name: ratio(times, name) for name in names}
            if dtype == torch.float32:
                goal_times = times
            else:
                goal_bf16 = times
    rows = [(name, *(_cell(values, name) for values in series.values())) for name in NAMES]
    table = Table(
        "Time in copies of n float32 values",
        ("update", *series),
        rows,
        [f"{NOTE} k x n: the peer combines k of the same vectors."],
    )
    goals = [
        Goal("(6)-(9), float32", 6, median_ratio(goal_times, OURS), unit="copies"),
        Goal("(6)-(9), bfloat16", 6, median_ratio(goal_bf16, OURS), unit="copies"),
        Goal("faster than written naively", 10, median_ratio(goal_times, NAIVE, OURS), at_least=True),
        Goal(f"{OURS} faster than {FOUR}", 2, median_ratio(goal_times, FOUR, OURS), at_least=True),
        Goal("one projection, float32", 3, median_ratio(goal_times, PROJECTION), unit="copies"),
        Goal(f"{PROJECTION} faster than {TWO}", 3, median_ratio(goal_times, TWO, PROJECTION), at_least=True),
    ]
    about = (
        f"d = g + αv + βr from four gradients of {mega(settings.values)} numbers in one tensor: inner products, "
        "coefficients and the combination in place, by `MDGDOptimizer.combine()`. The peers get a Jacobian that is "
        f"stacked already. Goals are held to {on(settings.threads[-1])}."
    )
    figure = figures.bars("Update of one vector", f"copies of {mega(settings.values)} float32 values", series)
    return Section("combine", "The update", about, [table], goals, figure)


def _cell(values: dict[str, Ratio | None], name: str) -> str:
    if name in PEER_ROWS and not PEER_ROWS[name][0].installed:
        return "not installed"
    return str(values[name] or "left out") if name in values else "—"

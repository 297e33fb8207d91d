"""The update: equations (6)-(9) of one large vector, and one projection alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import figures, naive
from benchmarks.peers import PEERS, TORCHJD_PCGRAD
from benchmarks.report import Goal, Section, Table, mega, on
from benchmarks.settings import Settings
from benchmarks.setups import Captured, gradients
from benchmarks.timing import NOTE, PATIENCE, Contender, Ratio, Times, copy_of, median_ratio, ratio
from torch_mdgd import Project

OURS, PROJECTION = "torch_mdgd, (6)-(9)", "torch_mdgd, one projection"
NAIVE, NAIVE_PROJECTION = "written naively, (6)-(9)", "written naively, one projection"
TWO, FOUR = (f"{TORCHJD_PCGRAD.name}, {rows} x n" for rows in (2, 4))
PEER_ROWS = {f"{peer.name}, 2 x n": (peer, 2) for peer in PEERS} | {FOUR: (TORCHJD_PCGRAD, 4)}
MAIN = (OURS, NAIVE, PROJECTION, NAIVE_PROJECTION, TWO, FOUR)
# Rivals, most of which take so many copies that fewer numbers have to do.
OTHERS = (PROJECTION, *(name for name in PEER_ROWS if name != FOUR))
NAMES = tuple(dict.fromkeys((*MAIN, *OTHERS)))
HALF = (OURS, PROJECTION)
ROWS = {torch.float32: MAIN, torch.bfloat16: HALF, torch.float16: HALF}
READS = "one thread takes half a copy to read a vector (see parts), and (6)-(9) reads ten and writes two"
COMPUTES = "16-bit numbers take about as long as float32's, so the time goes into computing and not into memory"
TIGHT = "one projection reads four vectors and writes one: a third of the rival's time is less than that takes here"
CHEAP = "memory that is new at each call, which is what the naive form pays for, is cheap on this machine"


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
    """Time the rows of each dtype, and the other rivals, on each number of threads."""
    series: dict[str, dict[str, Ratio | None]] = {}
    others: dict[str, dict[str, Ratio | None]] = {}
    goals = []
    many = {
        dtype: settings.race_on(settings.threads, contenders(settings.values, dtype, names))
        for dtype, names in ROWS.items()
    }
    few = settings.race_on(settings.threads, contenders(settings.few, torch.float32, OTHERS))
    for count in settings.threads:
        times = {dtype: many[dtype][count] for dtype in ROWS}
        for dtype, names in ROWS.items():
            label = f"{str(dtype).removeprefix('torch.')}, {on(count)}"
            series[label] = {name: ratio(times[dtype], name) for name in names}
        others[on(count)] = {name: ratio(few[count], name) for name in OTHERS}
        goals += _goals(times, on(count))
    tables = [
        Table(
            f"{mega(settings.values)} numbers, in copies of as many float32 values",
            ("update", *series),
            [(name, *(_cell(values, name) for values in series.values())) for name in MAIN],
            [f"{NOTE} k x n: the peer combines k of the same vectors."],
        ),
        Table(
            f"{mega(settings.few)} numbers, in copies of as many float32 values",
            ("update", *others),
            [(name, *(_cell(values, name) for values in others.values())) for name in OTHERS],
        ),
    ]
    about = (
        f"d = g + αv + βr from four gradients of {mega(settings.values)} numbers in one tensor: inner products, "
        "coefficients and the combination in place, by `MDGDOptimizer.combine()`. The peers get a Jacobian that is "
        "stacked already."
    )
    figure = figures.bars("Update of one vector", f"copies of {mega(settings.values)} float32 values", series)
    return Section("combine", "The update", about, tables, goals, figure)


def _goals(times: dict[torch.dtype, Times], where: str) -> list[Goal]:
    single = times[torch.float32]
    found = [
        Goal(f"(6)-(9), {str(dtype).removeprefix('torch.')}, {where}", 6, median_ratio(times[dtype], OURS),
             unit="copies", why=READS if dtype == torch.float32 else COMPUTES)
        for dtype in ROWS
    ]  # fmt: skip
    faster = ((OURS, NAIVE, 10, CHEAP), (OURS, FOUR, 2, CHEAP), (PROJECTION, TWO, 3, TIGHT))
    return [
        *found,
        Goal(f"one projection, float32, {where}", 3, median_ratio(single, PROJECTION), unit="copies", why=READS),
        *(
            Goal(f"{ours} faster than {rival}, {where}", least, median_ratio(single, rival, ours), at_least=True,
                 why=why)
            for ours, rival, least, why in faster
        ),
    ]  # fmt: skip


def _cell(values: dict[str, Ratio | None], name: str) -> str:
    if name in PEER_ROWS and not PEER_ROWS[name][0].installed:
        return "not installed"
    return str(values[name] or "left out") if name in values else "—"

"""Exact top-k masks: the library beside torch.topk, torch.kthvalue and np.partition, each up to the finished mask."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks import figures
from benchmarks.report import Goal, Section, Table, mega, on
from benchmarks.settings import Settings
from benchmarks.setups import gradients, normal
from benchmarks.timing import NOTE, PATIENCE, Contender, Ratio, copy_of, median_ratio, ratio, threads
from torch_mdgd import kernels

OURS, FUSED = "torch_mdgd, of scores", "torch_mdgd, of g, v, g~0"
TOPK, KTHVALUE, PARTITION = "torch.topk", "torch.kthvalue", "np.partition"
RIVALS = (TOPK, KTHVALUE, PARTITION)
NAMES = (OURS, FUSED, *RIVALS)
OWN, FAST = (OURS, FUSED), (OURS, FUSED, PARTITION)
HALF = (torch.bfloat16, torch.float16)
FRACTION = 0.10
TOPKS = "torch.topk took 165 copies on the processor that the goal was set on"


def by_topk(scores: Tensor, k: int) -> Tensor:
    """The positions of the k largest; which ones among equals is left to torch."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask[torch.topk(scores, k, sorted=False).indices] = True
    return mask


def by_kthvalue(scores: Tensor, k: int) -> Tensor:
    """All numbers not below the k-th largest; more than k if it is not the only one of its value."""
    return scores >= torch.kthvalue(scores, len(scores) - k + 1).values


def by_partition(scores: Tensor, k: int) -> Tensor:
    """As :func:`by_kthvalue`, with numpy's introselect."""
    array = scores.numpy()
    return torch.from_numpy(array >= np.partition(array, len(array) - k)[len(array) - k])


def of_scores(scores: Tensor, fraction: float, names: Sequence[str]) -> list[Contender]:
    """The named rows, of those that are given scores."""
    k = max(1, round(fraction * len(scores)))
    found = {
        OURS: lambda: kernels.top_k_masks([scores], k),
        TOPK: lambda: by_topk(scores, k),
        KTHVALUE: lambda: by_kthvalue(scores, k),
        PARTITION: lambda: by_partition(scores, k),
    }
    return [Contender(x, found[x], limit=PATIENCE if x in RIVALS else None) for x in found if x in names]


def contenders(
    n: int, fraction: float = FRACTION, names: Sequence[str] = NAMES, dtype: torch.dtype = torch.float32
) -> list[Contender]:
    """The named rows for n scores, and the copy that is their unit."""
    k = max(1, round(fraction * n))
    g, v, g0, _ = gradients([(n,)], dtype).values()
    a = torch.full((1,), 0.3, dtype=torch.float64)
    fused = Contender(FUSED, lambda: kernels.top_k_similarity_masks(g, v, g0, a, k))
    scores = normal((n,), torch.Generator().manual_seed(1), dtype)
    return [copy_of(n), *([fused] if FUSED in names else []), *of_scores(scores, fraction, names)]


def section(settings: Settings) -> Section:
    """Time all rows at one fraction on each number of threads, then those that are fast at several fractions."""
    n = settings.values
    series: dict[str, dict[str, Ratio | None]] = {}
    half: dict[str, dict[str, Ratio | None]] = {}
    goals = []
    single = settings.race_on(settings.threads, contenders(n))
    halved = {dtype: settings.race_on(settings.threads, contenders(n, FRACTION, OWN, dtype)) for dtype in HALF}
    for count, times in single.items():
        for dtype in HALF:
            label = f"{str(dtype).removeprefix('torch.')}, {on(count)}"
            half[label] = {name: ratio(halved[dtype][count], name) for name in OWN}
        series[on(count)] = {name: ratio(times, name) for name in NAMES}
        goals += [
            Goal(f"exact mask, {on(count)}", 4, median_ratio(times, OURS), unit="copies"),
            Goal(f"faster than np.partition, {on(count)}", 1, median_ratio(times, PARTITION, OURS), at_least=True),
            Goal(f"faster than torch.topk, {on(count)}", 15, median_ratio(times, TOPK, OURS), at_least=True, why=TOPKS),
        ]
    table = Table(
        f"{FRACTION:.0%} of {mega(n)} float32 scores, in copies of them",
        ("mask", *series),
        [(name, *(str(values[name] or "left out") for values in series.values())) for name in NAMES],
        [f"{NOTE} torch_mdgd breaks ties by position; the others return any k, or more than k."],
    )
    halves = Table(
        f"{FRACTION:.0%} of {mega(n)} scores of 16 bits, in copies of float32",
        ("mask", *half),
        [(name, *(str(values[name]) for values in half.values())) for name in OWN],
    )
    by_fraction = {}
    for fraction in settings.fractions:
        with threads(settings.threads[-1]):
            by_fraction[fraction] = settings.race(contenders(n, fraction, FAST))
    fractions = Table(
        f"By fraction, in copies, {on(settings.threads[-1])}",
        ("mask", *(f"{fraction:.0%}" for fraction in by_fraction)),
        [(name, *(str(ratio(times, name) or "left out") for times in by_fraction.values())) for name in FAST],
    )
    about = (
        "The largest scores of all tensors together, as a bool mask with an exact count. "
        "The row of g, v, g~0 computes the scores (10) as well, in float64 and block by block. np.partition uses one "
        "thread."
    )
    figure = figures.bars(table.title, f"copies of {mega(n)} float32 values", series)
    return Section("masking", "Top-k masks", about, [table, halves, fractions], goals, figure)

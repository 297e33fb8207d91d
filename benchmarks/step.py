"""One whole ``optimizer.step()`` with its captures set, over the tensors of LLaVA's trained layers."""

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import figures
from benchmarks.methods import WRAPPED
from benchmarks.report import Goal, Section, Table, on
from benchmarks.settings import Settings
from benchmarks.setups import Captured, Shape, count, gradients, llava, overwritable
from benchmarks.timing import Contender, Ratio, copy_of, median_ratio, ratio, threads

FUSED, FOREACH = "AdamW(fused)", "AdamW(foreach)"
NAMES = (FUSED, FOREACH, *WRAPPED)


def contenders(shapes: Sequence[Shape], names: Sequence[str] = NAMES) -> list[Contender]:
    """The named rows for parameters of these shapes, and the copy of as many numbers that is their unit."""
    originals = gradients(shapes)
    work = overwritable(originals)
    found = [copy_of(count(shapes))]
    for name in names:
        if name in WRAPPED:
            wrapped = Captured(
                originals, work, partial(torch.optim.AdamW, fused=True), **(WRAPPED[name].wrapper() or {})
            )
            found.append(Contender(name, wrapped.step, wrapped.prepare))
        else:
            found.append(Contender(name, _plain(originals["task"], fused=name == FUSED)))
    return found


def _plain(task: Sequence[torch.Tensor], fused: bool):
    parameters = [torch.zeros_like(x).normal_(std=0.02).requires_grad_() for x in task]
    for p, x in zip(parameters, task, strict=True):
        p.grad = x
    return torch.optim.AdamW(parameters, lr=1e-6, fused=fused, foreach=not fused).step


def section(settings: Settings) -> Section:
    """Time all rows on each number of threads."""
    shapes = llava(settings.divide)
    series: dict[str, dict[str, Ratio | None]] = {}
    for number in settings.threads:
        with threads(number):
            times = settings.race(contenders(shapes))
        series[f"copies, {on(number)}"] = {name: ratio(times, name) for name in NAMES}
        series[f"{FUSED} steps, {on(number)}"] = {name: ratio(times, name, FUSED) for name in NAMES}
    table = Table(
        "Time of a step, in copies of all parameters and in steps of AdamW(fused)",
        ("step", *series),
        [(name, *(str(values[name]) for values in series.values())) for name in NAMES],
        ["Median and quartiles. The masked step is one after the mask was chosen."],
    )
    goals = [
        Goal(f"{name}, against AdamW(fused) alone", 3, median_ratio(times, name, FUSED))
        for name in WRAPPED
    ]  # fmt: skip
    about = (
        f"LLaVA-1.5's last six decoder layers and projector with every width divided by {settings.divide}: "
        f"{len(shapes)} tensors, {count(shapes):,} numbers. A step of MDGD includes combining; the backward passes "
        "have run already."
    )
    shown = {name: values for name, values in series.items() if name.startswith("copies")}
    return Section("step", "The step", about, [table], goals, figures.bars("A step", "copies", shown))

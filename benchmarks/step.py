"""One whole ``optimizer.step()`` with its captures set, over the tensors of LLaVA's trained layers."""

import statistics
import warnings
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import figures
from benchmarks.llama import batch_of, llama
from benchmarks.methods import WRAPPED
from benchmarks.report import Goal, Section, Table, on
from benchmarks.settings import Settings
from benchmarks.setups import Captured, Shape, count, gradients, llava, overwritable
from benchmarks.timing import Contender, Ratio, copy_of, interleave, median_ratio, ratio, threads
from torch_mdgd import MDGD, Anchor, MDGDOptimizer, Project

FUSED, FOREACH = "AdamW(fused)", "AdamW(foreach)"
NAMES = (FUSED, FOREACH, *WRAPPED)
LIMITS = {"MDGD": 3, "MDGD, project": 2}
SMALL_TENSORS, SMALL_SHAPE = 400, (16, 16)


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


def overheads(settings: Settings) -> dict[str, float]:
    """Milliseconds that steps of three rules take over AdamW(fused)'s, for many small tensors, by rule."""
    originals = gradients([SMALL_SHAPE] * SMALL_TENSORS)
    adamw = partial(torch.optim.AdamW, fused=True)
    rows = [Contender(FUSED, _plain(originals["task"], fused=True))]
    for name, rule in (("Project()", Project()), ("published", MDGD())):
        wrapped = Captured(originals, None, adamw, rule=rule)
        rows.append(Contender(name, wrapped.step, wrapped.prepare))
    joint = _joint(originals["task"])
    with threads(1):
        times = interleave([*rows, joint], rounds=max(settings.rounds, 25))
    return {
        name: 1e3 * statistics.median(a - b for a, b in zip(taken, times[FUSED], strict=True))
        for name, taken in times.items()
        if name != FUSED
    }


def _joint(task: Sequence[torch.Tensor]) -> Contender:
    """αv from one backward pass."""
    parameters = [torch.zeros_like(x).requires_grad_() for x in task]
    optimizer = MDGDOptimizer(torch.optim.AdamW(parameters, lr=1e-6, fused=True), MDGD(regularize=0))

    def prepare() -> None:
        optimizer.zero_grad()
        with optimizer.capture("joint"):
            for p, x in zip(parameters, task, strict=True):
                p.grad = x

    return Contender("αv", optimizer.step, prepare)


def anchored(settings: Settings) -> float:
    """What a step of the anchor, its pull and AdamW(fused), takes in steps of AdamW(fused), on a small Llama."""
    model = llama(settings.hidden, settings.layers)
    parameters = list(model.parameters())
    task = gradients([tuple(p.shape) for p in parameters])["task"]
    work = [x.clone() for x in task]
    with warnings.catch_warnings():
        # Of what it does not hold.
        warnings.simplefilter("ignore")
        rule = Anchor(model)
        optimizer = MDGDOptimizer(torch.optim.AdamW(parameters, lr=1e-6, fused=True), rule)
    rule.calibrate([batch_of(4, 32)])

    def prepare() -> None:
        optimizer.zero_grad()
        torch._foreach_copy_(work, task)
        with optimizer.capture("task"):
            for p, x in zip(parameters, work, strict=True):
                p.grad = x

    with threads(settings.threads[-1]):
        times = settings.race(
            [Contender(FUSED, _plain(task, fused=True)), Contender("Anchor", optimizer.step, prepare)]
        )
    return median_ratio(times, "Anchor", FUSED) or 0.0


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
        Goal(f"{name}, against AdamW(fused) alone", LIMITS.get(name, 3), median_ratio(times, name, FUSED))
        for name in WRAPPED
    ]  # fmt: skip
    for name, over in overheads(settings).items():
        goals.append(Goal(f"{SMALL_TENSORS} tensors of {SMALL_SHAPE}, {name}: over AdamW(fused)", 1, over, unit="ms"))
    goals.append(Goal("Anchor on a Llama, against AdamW(fused) alone", 1.15, anchored(settings)))
    about = (
        f"LLaVA-1.5's last six decoder layers and projector with every width divided by {settings.divide}: "
        f"{len(shapes)} tensors, {count(shapes):,} numbers. A step of MDGD includes combining; the backward passes "
        "have run already."
    )
    shown = {name: values for name, values in series.items() if name.startswith("copies")}
    return Section("step", "The step", about, [table], goals, figures.bars("A step", "copies", shown))

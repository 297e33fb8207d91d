"""One whole ``optimizer.step()`` with its captures set, over the tensors of LLaVA's trained layers."""

import warnings
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import figures
from benchmarks.llama import batch_of, llama
from benchmarks.methods import WRAPPED
from benchmarks.report import Goal, Section, Table, on
from benchmarks.settings import Settings
from benchmarks.setups import Captured, Shape, count, gradients, llava, overwritable, parameters
from benchmarks.timing import Contender, Ratio, copy_of, median_ratio, over, ratio
from torch_mdgd import MDGD, Anchor, MDGDOptimizer, Project

FUSED, FOREACH, JOINT, ANCHOR = "AdamW(fused)", "AdamW(foreach)", "αv", "anchor, on a Llama"
NAMES = (FUSED, FOREACH, *WRAPPED)
LIMITS = {"MDGD": 3, "MDGD, project": 2}
SMALL_TENSORS, SMALL_SHAPE = 400, (16, 16)
MEMORY = (
    "AdamW(fused) moves 7 vectors, Project 5 more and (6)-(9) 12 more, and all of them have nothing to do but wait "
    "for memory"
)
PULL = "W, φ and g are read and g written, which alone makes 1.9 of AdamW's 1, and a product with C lies between"
CALLS = (
    "Python asks each tensor of each list for its address, dtype and layout: five lists for two gradients, twelve for "
    "four"
)
BOOKKEEPING = "no kernel runs: it is Python, two microseconds a tensor"


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
    trained = parameters(task)
    for p, x in zip(trained, task, strict=True):
        p.grad = x
    return torch.optim.AdamW(trained, lr=1e-6, fused=fused, foreach=not fused).step


def overheads(settings: Settings) -> dict[str, Ratio]:
    """Milliseconds that steps of three rules take over AdamW(fused)'s, for many small tensors, by rule."""
    originals = gradients([SMALL_SHAPE] * SMALL_TENSORS)
    adamw = partial(torch.optim.AdamW, fused=True)
    rows = [Contender(FUSED, _plain(originals["task"], fused=True)), _joint(originals["task"])]
    for name, rule in (("Project()", Project()), ("published", MDGD())):
        wrapped = Captured(originals, None, adamw, rule=rule)
        rows.append(Contender(name, wrapped.step, wrapped.prepare))
    (times,) = settings.race_on([1], rows).values()
    return {name: over(times, name, FUSED) for name in times if name != FUSED}


def _joint(task: Sequence[torch.Tensor]) -> Contender:
    """αv from one backward pass."""
    parameters = [torch.zeros_like(x).requires_grad_() for x in task]
    optimizer = MDGDOptimizer(torch.optim.AdamW(parameters, lr=1e-6, fused=True), MDGD(regularize=0))

    def prepare() -> None:
        optimizer.zero_grad()
        with optimizer.capture("joint"):
            for p, x in zip(parameters, task, strict=True):
                p.grad = x

    return Contender(JOINT, optimizer.step, prepare)


def anchored(settings: Settings) -> dict[int, Ratio | None]:
    """What a step of the anchor, its pull and AdamW(fused), takes in steps of AdamW(fused), by number of threads."""
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

    rows = [Contender(FUSED, _plain(task, fused=True)), Contender(ANCHOR, optimizer.step, prepare)]
    timed = settings.race_on(settings.threads, rows)
    return {count: ratio(times, ANCHOR, FUSED) for count, times in timed.items()}


def section(settings: Settings) -> Section:
    """Time all rows on each number of threads."""
    shapes = llava(settings.divide)
    series: dict[str, dict[str, Ratio | None]] = {}
    anchors: dict[str, Ratio | None] = {}
    goals = []
    timed, pulls = settings.race_on(settings.threads, contenders(shapes)), anchored(settings)
    for number, times in timed.items():
        anchors[on(number)] = pull = pulls[number]
        series[f"copies, {on(number)}"] = {name: ratio(times, name) for name in NAMES}
        series[f"{FUSED} steps, {on(number)}"] = {name: ratio(times, name, FUSED) for name in NAMES}
        against = f"against {FUSED} alone, {on(number)}"
        goals += [
            Goal(f"{name}, {against}", LIMITS.get(name, 3), median_ratio(times, name, FUSED), why=MEMORY)
            for name in WRAPPED
        ]
        goals.append(Goal(f"{ANCHOR}, {against}", 1.15, pull.median if pull else None, why=PULL))
    small = overheads(settings)
    for name, more in small.items():
        what = f"{SMALL_TENSORS} tensors of {SMALL_SHAPE}, {name}: over {FUSED}, {on(1)}"
        goals.append(Goal(what, 1, more.median, unit="ms", why=BOOKKEEPING if name == JOINT else CALLS))
    tables = [
        Table(
            f"Time of a step, in copies of all parameters and in steps of {FUSED}",
            ("step", *series),
            [(name, *(str(values[name]) for values in series.values())) for name in NAMES],
            ["Median and quartiles. The masked step is one after the mask was chosen."],
        ),
        Table(
            f"{ANCHOR}, in steps of {FUSED}",
            ("step", *anchors),
            [(ANCHOR, *map(str, anchors.values()))],
        ),
        Table(
            f"{SMALL_TENSORS} tensors of {SMALL_SHAPE}: milliseconds over {FUSED}, {on(1)}",
            ("step", "ms"),
            [(name, str(more)) for name, more in small.items()],
        ),
    ]
    about = (
        f"LLaVA-1.5's last six decoder layers and projector with every width divided by {settings.divide}: "
        f"{len(shapes)} tensors, {count(shapes):,} numbers. A step of MDGD includes combining; the backward passes "
        "have run already."
    )
    shown = {name: values for name, values in series.items() if name.startswith("copies")}
    return Section("step", "The step", about, tables, goals, figures.bars("A step", "copies", shown))

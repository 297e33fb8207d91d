"""Whole training steps of a small language model, beside plain fine-tuning and peft's adapters."""

from collections.abc import Sequence

from benchmarks import figures
from benchmarks.language_model import build
from benchmarks.methods import CHEAPER, COMPACT, FRACTION, MDGD, METHODS, PLAIN, SHIRA, Method
from benchmarks.report import Goal, Section, Table, on
from benchmarks.settings import Settings
from benchmarks.timing import Contender, median_ratio, ratio, threads


def contenders(settings: Settings, methods: Sequence[Method] = METHODS) -> list[Contender]:
    """One training step of each installed method; the first, Fine-tune, is the unit."""
    return [Contender(method.name, build(method, settings).step) for method in methods if method.installed]


def section(settings: Settings) -> Section:
    """Time all methods on each number of threads."""
    series = {}
    for count in settings.threads:
        with threads(count):
            times = settings.race(contenders(settings))
        values = {method.name: ratio(times, method.name, PLAIN.name) for method in METHODS}
        series[on(count)] = values
    rows = []
    for method in METHODS:
        rows.append((method.name, *(str(values[method.name] or "not installed") for values in series.values())))
    plain = build(PLAIN, settings)
    goals = [
        Goal("MDGD, against Fine-tune", 3.4, median_ratio(times, MDGD.name, PLAIN.name)),
        *(Goal(f"{m.name}, against MDGD", 1, median_ratio(times, m.name, MDGD.name)) for m in CHEAPER),
        *(Goal(f"{m.name}, against MDGD", 1, median_ratio(times, m.name, MDGD.name)) for m in COMPACT),
        *(Goal(f"{m.name}, against SHiRA", 1.15, median_ratio(times, m.name, SHIRA.name)) for m in COMPACT),
    ]
    about = (
        f"A random Llama of {plain.trained:,} numbers, all trained, 4 × 32 tokens, AdamW(fused). LoRA and SHiRA train "
        f"{FRACTION:.0%} of as many numbers in all linear layers. MDGD takes 3 forward and 4 backward passes; "
        "project and step space 2 and 2; MDGD-GM, after its mask was chosen, 2 forward passes, one of them without a "
        "graph, and one backward pass."
    )
    title = "Time of a training step, in steps of Fine-tune"
    table = Table(title, ("method", *series), rows, ["Median and quartiles."])
    figure = figures.bars("A training step", "steps of Fine-tune", series, log=False)
    return Section("training", "The training step", about, [table], goals, figure)

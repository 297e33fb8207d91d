"""Whole training steps of a small language model, beside plain fine-tuning and peft's adapters."""

from collections.abc import Sequence

from benchmarks import figures
from benchmarks.language_model import build
from benchmarks.methods import CHEAPER, COMPACT, FRACTION, MDGD, METHODS, PLAIN, SHIRA, Method
from benchmarks.report import Goal, Section, Table, on
from benchmarks.settings import Settings
from benchmarks.timing import Contender, median_ratio, ratio

UPDATE = "3 forward and 4 backward passes are 3.33 of a step's; the update itself comes on top"
FORWARD = "SHiRA makes one forward pass, MDGD-GM a second one at φ, without a graph"


def contenders(settings: Settings, methods: Sequence[Method] = METHODS) -> list[Contender]:
    """One training step of each installed method; the first, Fine-tune, is the unit."""
    return [Contender(method.name, build(method, settings).step) for method in methods if method.installed]


def section(settings: Settings) -> Section:
    """Time all methods on each number of threads."""
    series, goals = {}, []
    for count, times in settings.race_on(settings.threads, contenders(settings)).items():
        series[on(count)] = {method.name: ratio(times, method.name, PLAIN.name) for method in METHODS}
        pairs = [
            (MDGD, PLAIN, 3.4),
            *((method, MDGD, 1) for method in (*CHEAPER, *COMPACT)),
            *((method, SHIRA, 1.15) for method in COMPACT),
        ]
        goals += [
            Goal(f"{one.name}, against {other.name}, {on(count)}", limit, median_ratio(times, one.name, other.name),
                 why=UPDATE if other is PLAIN else FORWARD if other is SHIRA else "")
            for one, other, limit in pairs
        ]  # fmt: skip
    rows = []
    for method in METHODS:
        rows.append((method.name, *(str(values[method.name] or "not installed") for values in series.values())))
    plain = build(PLAIN, settings)
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

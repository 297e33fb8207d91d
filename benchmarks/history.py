"""What a history of visual gradients costs a step in step space, and what it keeps."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import figures
from benchmarks.report import Goal, Section, Table, mega
from benchmarks.settings import Settings
from benchmarks.setups import Captured, Shape, count, decoder_layer, gradients, llava, overwritable
from benchmarks.timing import Contender, Ratio, median_ratio, ratio, threads
from torch_mdgd import Given

HISTORIES = (1, 4, 16, 64)
LONG = 16
FULL = f"{LONG}, in full"
LIMIT = 1.5


def lists(settings: Settings) -> dict[str, list[Shape]]:
    """LLaVA's trained layers, narrower, and one of them four times as wide."""
    wide = 4096 * 4 // settings.divide, 11008 * 4 // settings.divide
    return {
        f"LLaVA's list / {settings.divide}": llava(settings.divide),
        f"a decoder layer, {wide[0]} and {wide[1]} wide": decoder_layer(*wide),
    }


def optimizers(shapes: Sequence[Shape]) -> dict[str, Captured]:
    """By name, those that are compared; a mask of all numbers keeps directions as they are, not as two vectors."""
    originals = gradients(shapes)
    work = overwritable(originals)
    everything = Given([torch.ones(shape, dtype=torch.bool) for shape in shapes])
    wanted: dict[str, dict[str, Any]] = {str(k): {"history": k} for k in HISTORIES}
    wanted[FULL] = {"history": LONG, "mask": everything}
    adamw = partial(torch.optim.AdamW, fused=True)
    return {
        name: Captured(originals, work, adamw, update="project", space="step", **settings)
        for name, settings in wanted.items()
    }


def remembered(captured: Captured) -> int:
    """Bytes of directions between steps."""
    entries = captured.optimizer.state_dict()["state"].values()
    return sum(x.nbytes for entry in entries for key, x in entry.items() if "history" in key)


def section(settings: Settings) -> Section:
    """Time a step of each, and count what it keeps, for both lists."""
    series: dict[str, dict[str, Ratio | None]] = {}
    rows: dict[str, list[str]] = {}
    goals = []
    with threads(1):
        for title, shapes in lists(settings).items():
            found = optimizers(shapes)
            times = settings.race([Contender(name, each.step, each.prepare) for name, each in found.items()])
            series[title] = {name: ratio(times, name, "1") for name in found}
            for name, each in found.items():
                share = remembered(each) / (4 * count(shapes))
                rows.setdefault(name, []).extend([str(series[title][name]), f"{100 * share:.1f} %"])
            goals.append(Goal(f"history {LONG}, {title}", LIMIT, median_ratio(times, str(LONG), "1")))
    columns = ("history", *(f"{title}: {what}" for title in series for what in ("time", "kept")))
    table = Table(
        "A step, in steps of history 1",
        columns,
        [(name, *cells) for name, cells in rows.items()],
        [
            "Time: median and quartiles of interleaved rounds, one thread; combining, AdamW(fused) and the correction "
            "of its move, but no backward pass. Kept: bytes of directions between steps, in float32 gradients."
        ],
    )
    sizes = "; ".join(f"{title}: {mega(count(shapes))} numbers" for title, shapes in lists(settings).items())
    about = f"optimizer.step() in step space with captures set. {sizes}."
    figure = figures.bars("A step in step space", "steps of history 1", series, log=False)
    return Section("history", "A history of visual gradients", about, [table], goals, figure)

"""``python -m benchmarks``: print every table, and write it with its picture into ``benchmarks/results``.

A run goes through its sections lap by lap, so that quartiles hold what drifts meanwhile; what is counted and not timed
has one lap. ``costs`` takes as long as all others together, and has to be named. ``python -m benchmarks gpu``,
``compare`` and ``goals`` are programs of their own, see the modules of these names.
"""

import argparse
import gc
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import bandwidth, combine, costs, masking, memory, parts, scaling, shapes, step, training
from benchmarks.goals import RUN
from benchmarks.report import Section, machine
from benchmarks.settings import QUICK, Settings
from benchmarks.timing import Races

SECTIONS = {
    "combine": combine.section,
    "parts": parts.section,
    "masking": masking.section,
    "shapes": shapes.section,
    "step": step.section,
    "training": training.section,
    "scaling": scaling.section,
    "costs": costs.section,
    "memory": memory.section,
    "bandwidth": bandwidth.section,
}
APART = ("costs",)
ONE_LAP = ("costs", "memory", "bandwidth")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(SECTIONS)} (default: all but {', '.join(APART)})"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="thread counts (default: 1 and 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where results are written")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in SECTIONS]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(SECTIONS)}")
    settings = QUICK if options.quick else Settings()
    if options.threads:
        settings = replace(settings, threads=tuple(options.threads))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", module="(peft|transformers).*")
    print(machine())
    took = run(options.names or [name for name in SECTIONS if name not in APART], settings, options.out)
    print(f"{sum(took.values()):.0f} s in all")
    if not options.names:
        (options.out / RUN).write_text(summary(took, settings), encoding="utf-8")


def run(names: Sequence[str], settings: Settings, out: Path) -> dict[str, float]:
    """Measure the sections, show and write each in the last lap; seconds of each, all laps together."""
    races = {name: Races() for name in names}
    took = dict.fromkeys(names, 0.0)
    for lap in range(1, settings.laps + 1):
        if lap == 2:
            # What was imported, which is most of what every collection looks through.
            gc.collect()
            gc.freeze()
        for name in names:
            if lap < settings.laps and name in ONE_LAP:
                continue
            start = time.perf_counter()
            section = _measure(name, replace(settings, races=races[name]))
            seconds = time.perf_counter() - start
            took[name] += seconds
            print(f"lap {lap} of {settings.laps}: {name}, {seconds:.0f} s", flush=True)
            if lap == settings.laps:
                section.show()
                section.write(out)
    return took


def _measure(name: str, settings: Settings) -> Section:
    assert settings.races is not None
    torch.manual_seed(0)
    settings.races.begin()
    return SECTIONS[name](settings)


def summary(took: dict[str, float], settings: Settings) -> str:
    """A page about the run itself."""
    rows = [f"| {name} | {seconds:.0f} |" for name, seconds in took.items()]
    laps = f"{settings.laps} laps, {_counts(settings.threads)} threads"
    about = f"All pages but {', '.join(APART)} in {sum(took.values()):.0f} s, {laps}."
    return "\n".join(["# The run", "", about, "", machine(), "", "| page | seconds |", "| :-- | --: |", *rows]) + "\n"


def _counts(threads: Sequence[int]) -> str:
    return " and ".join(map(str, threads))

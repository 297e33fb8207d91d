"""``python -m benchmarks``: print every table, and write it with its picture into ``benchmarks/results``.

``python -m benchmarks gpu`` and ``compare`` are programs of their own, see the modules of these names.
"""

import argparse
import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import bandwidth, combine, costs, masking, memory, parts, scaling, shapes, step, training
from benchmarks.report import machine
from benchmarks.settings import QUICK, Settings

SECTIONS = {
    "combine": combine.section,
    "parts": parts.section,
    "masking": masking.section,
    "shapes": shapes.section,
    "step": step.section,
    "training": training.section,
    "costs": costs.section,
    "memory": memory.section,
    "bandwidth": bandwidth.section,
    "scaling": scaling.section,
}

# Takes as long as all others together.
APART = ("costs",)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    usual = [name for name in SECTIONS if name not in APART]
    parser.add_argument("names", nargs="*", metavar="NAME", help="as --only")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=usual, metavar="NAME",
                        help=f"of {', '.join(SECTIONS)}")  # fmt: skip
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
    for name in options.names or options.only:
        torch.manual_seed(0)
        section = SECTIONS[name](settings)
        section.show()
        section.write(options.out)

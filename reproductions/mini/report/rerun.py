"""The claims that carry the recommendation, run again with the settings that the study chose: under an hour."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from reproductions.mini.experiment import study
from reproductions.mini.experiment.cells import CELLS, Cell
from reproductions.mini.experiment.methods import Method
from reproductions.mini.experiment.outcomes import CellOutcomes, Outcome
from reproductions.mini.experiment.parallel import execute_all
from reproductions.mini.experiment.study import Size
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.report.claims import RECOMMENDATION
from reproductions.mini.report.verdicts import Verdict, verdicts
from reproductions.shared.files import write
from reproductions.shared.results import Result, read_results

FILE = "claims.jsonl"
PLACES: tuple[Cell, ...] = tuple(cell for cell in CELLS if cell.base == "adamw")
NAMES = tuple(
    dict.fromkeys(
        name for claim in RECOMMENDATION for c in claim.conditions for name in (c.baseline, c.system) if name in SYSTEMS
    )
)
"""The systems that these claims are of."""


def rerun(
    output: Path, settings: Path, seeds: Sequence[int], size: Size, console: Console, workers: int | None = None
) -> list[tuple[Cell, Verdict]]:
    """Test the systems of these claims, on digits and captions with AdamW; print and write what becomes of each claim.

    Args:
        output: folder of `test.jsonl`, which holds each run with the versions that made it and is taken up again, and
            of `claims.jsonl`, a line a claim and cell.
        settings: folder of a study, whose `tune.jsonl` they are chosen from; a system that it has not tuned is not run.
        seeds: of tests.
        size: of the runs; settings are those of the study's own size.
        console: for progress and verdicts.
        workers: processes; one a core by default.

    Returns:
        the verdicts.

    Raises:
        FileNotFoundError: there is no `tune.jsonl`.
        ValueError: a seed that settings are chosen with.
    """
    study.require_test_seeds(seeds)
    if not (settings / "tune.jsonl").is_file():
        raise FileNotFoundError(f"no file {settings / 'tune.jsonl'}: `mini study --output {settings}` makes it")
    tuned = read_results(settings / "tune.jsonl")
    methods = {cell: _chosen(cell, tuned) for cell in PLACES}
    # One seed of every system first, so that a kill leaves something to compare.
    runs = [
        run
        for seed in seeds
        for cell, chosen in methods.items()
        for run in study.runs_of(cell, list(chosen.values()), [seed], size)
    ]
    found = {result["key"]: result for result in execute_all(runs, output / "test.jsonl", console, workers)}
    told = []
    for cell, chosen in methods.items():
        lacking = [SYSTEMS[name].label for name in NAMES if name not in chosen]
        if lacking:
            console.print(f"{cell.title}: {settings} has not tuned {'; '.join(lacking)}", soft_wrap=True)
        told += [(cell, verdict) for verdict in verdicts(_outcomes(cell, chosen, seeds, size, found), RECOMMENDATION)]
    versions = {name: version for result in found.values() for name, version in result.get("versions", {}).items()}
    lines = [json.dumps(_line(cell, verdict, seeds, versions), ensure_ascii=False) for cell, verdict in told]
    write(output / FILE, "".join(f"{line}\n" for line in lines))
    for cell, verdict in told:
        console.print(
            f"{verdict.outcome}: {verdict.claim.text} ({cell.title}) {verdict.evidence}",
            soft_wrap=True, markup=False, highlight=False,
        )  # fmt: skip
    return told


def _chosen(cell: Cell, tuned: dict[str, Result]) -> dict[str, Method]:
    settled = study.settled(cell, Size(), tuned)
    return {name: settled[name] for name in NAMES if name in settled}


def _outcomes(
    cell: Cell, methods: Mapping[str, Method], seeds: Sequence[int], size: Size, found: Mapping[str, Result]
) -> CellOutcomes:
    systems = {}
    for name, method in methods.items():
        runs = {seed: found[study.runs_of(cell, [method], [seed], size)[0].key] for seed in seeds}
        systems[name] = Outcome(SYSTEMS[name], method, runs, ())
    return CellOutcomes(cell, systems, (), {}, {}, {}, {})


def _line(cell: Cell, verdict: Verdict, seeds: Sequence[int], versions: Mapping[str, str]) -> Result:
    return {
        "cell": cell.name, "claim": verdict.claim.text, "outcome": verdict.outcome, "rule": verdict.rule,
        "evidence": verdict.evidence, "p": None if math.isnan(verdict.p) else verdict.p, "seeds": list(seeds),
        "versions": dict(versions),
    }  # fmt: skip

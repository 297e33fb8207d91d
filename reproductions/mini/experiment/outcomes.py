"""What a folder of the study's results holds, system by system; what is missing is no error."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from reproductions.mini.experiment import study
from reproductions.mini.experiment.cells import ALL_CELLS, LONG, Cell
from reproductions.mini.experiment.costs import read_costs
from reproductions.mini.experiment.methods import Method
from reproductions.mini.experiment.run import Run
from reproductions.mini.experiment.scores import average, h_scores, kept, target_score
from reproductions.mini.experiment.study import TEST_SEEDS, Size
from reproductions.mini.experiment.systems import SYSTEMS, System
from reproductions.mini.model.checkpoint import CHECKPOINT, CHECKPOINTS
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.shared.results import Result, read_results
from reproductions.shared.stats import Difference, paired

Measure = Callable[[Result], float]
Tried = tuple[Method, Sequence[Result]]

SCORES: dict[str, Measure] = {
    "T": target_score,
    "P": kept,
    "P exact": lambda result: result["P"],
    "P restricted": lambda result: result["P_restricted"],
    "Avg": average,
    "H": lambda result: h_scores(result)["H"],
    "H LLaVA": lambda result: h_scores(result)["H LLaVA"],
    "H MiniCPM": lambda result: h_scores(result)["H MiniCPM"],
}
"""In percent. A run that diverged counts as zero, as it does where settings are chosen."""

OTHERS: dict[str, Measure] = {
    "rank": lambda result: fmean(result["rank"][task] for task in PRETRAINED_TASKS),
    "rank, scenes": lambda result: result["effective_rank"]["scenes"],
    "rank, target": lambda result: result["effective_rank"][result["target"]],
    "drift": lambda result: 100 * fmean(result["relative_drift"].values()),
    "peak bytes": lambda result: result["peak_bytes"],
}
"""Of the runs that did not diverge. "rank" is the mean over the pre-trained tasks; drift is in percent of mean |z|."""

LATER: dict[str, str] = {
    "KL": "kl",
    "T of the first": "T_first",
    "T of the second": "T_second",
    "P of facts": "P_facts",
}
"""Measures that not all results hold, and what results call them.

KL(p_φ ‖ p_θ) on the target, in nats. In percent: what is kept of the targets before, words right; and of questions
without a picture, exact matches.
"""


@dataclass(frozen=True)
class Outcome:
    """A system in a cell.

    Attributes:
        system: which.
        method: with its chosen settings; None where they are not chosen yet.
        runs: test results by seed; of what trains nothing, its checkpoint's for each seed.
        missing: seeds of the study without a result.
    """

    system: System
    method: Method | None
    runs: Mapping[int, Result]
    missing: tuple[int, ...]

    @property
    def diverged(self) -> tuple[int, ...]:
        return tuple(seed for seed, run in self.runs.items() if "failed" in run)

    @property
    def models(self) -> dict[int, str]:
        """The pre-trained model that each seed began with: the name of its checkpoint's folder."""
        return {seed: json.loads(run["key"]).get("checkpoint", CHECKPOINT.name) for seed, run in self.runs.items()}

    def values(self, measure: str) -> dict[int, float]:
        """A measure of `SCORES`, `OTHERS` or `LATER` by seed; of these, of the runs that hold it."""
        if measure in SCORES:
            return {seed: 0.0 if "failed" in run else SCORES[measure](run) for seed, run in self.runs.items()}
        if measure in LATER:
            return {seed: run[LATER[measure]] for seed, run in self.runs.items() if LATER[measure] in run}
        return {seed: OTHERS[measure](run) for seed, run in self.runs.items() if "failed" not in run}


@dataclass(frozen=True)
class CellOutcomes:
    """A cell of the study.

    Attributes:
        cell: which.
        systems: by name, those with test results, in the study's order.
        untested: labels of the other systems that the folder holds results of.
        frontier: by system, the setting that was varied and, by its values, the results that are there.
        tuning: by system, every candidate with validation results.
        edges: by system that was tested, what was tried beyond the edges of its candidates.
        step_seconds: by system, of processor time.
    """

    cell: Cell
    systems: Mapping[str, Outcome]
    untested: tuple[str, ...]
    frontier: Mapping[str, tuple[str, Mapping[float, Sequence[Result]]]]
    tuning: Mapping[str, Sequence[Tried]]
    edges: Mapping[str, Sequence[Tried]]
    step_seconds: Mapping[str, float]

    @property
    def title(self) -> str:
        return self.cell.title

    def difference(self, measure: str, name: str, baseline: str) -> Difference | None:
        """What a system has more than another on the seeds of both, by model; None where there are none."""
        ours, theirs = (self.systems[x].values(measure) if x in self.systems else {} for x in (name, baseline))
        return paired(ours, theirs, self.systems[name].models) if ours.keys() & theirs.keys() else None

    def same(self, name: str, baseline: str) -> bool:
        """Whether two systems came to the same settings, and so share their runs."""
        keys = [{run["key"] for run in self.systems[each].runs.values()} for each in (name, baseline)]
        return keys[0] == keys[1]

    @property
    def distinct(self) -> list[str]:
        """Names of the systems; of those that share their runs the first."""
        found: list[str] = []
        for name in self.systems:
            if not any(self.same(name, other) for other in found):
                found.append(name)
        return found


def load(folder: Path) -> list[CellOutcomes]:
    """Every cell of the study, with whatever `tune.jsonl`, `test.jsonl`, `costs.jsonl` and `frontier.jsonl` hold of it.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: `mini study --output {folder}` makes it")
    tuned, tested, varied = (read_results(folder / f"{stage}.jsonl") for stage in ("tune", "test", "frontier"))
    keys = [[json.loads(key) for key in found] for found in (tuned, tested)]
    cells = [_cell(cell, keys, tuned, tested, varied, read_costs(folder, cell.name)) for cell in ALL_CELLS]
    # A study may be older than a system, and then has nothing to say of it, though another's settings may be its own.
    begun = {name for cell in cells for name in (*cell.systems, *cell.tuning) if SYSTEMS[name].times == 1}
    untested = [
        tuple(
            s.label for name, s in SYSTEMS.items() if name in begun and name not in cell.systems and s.fits(cell.cell)
        )
        for cell in cells
    ]
    return [replace(cell, untested=labels) for cell, labels in zip(cells, untested, strict=True)]


def _cell(
    cell: Cell,
    keys: Sequence[Sequence[Mapping]],
    tuned: dict[str, Result],
    tested: dict[str, Result],
    varied: dict[str, Result],
    step_seconds: Mapping[str, float],
) -> CellOutcomes:
    own = [[key for key in some if _of(key, cell)] for some in keys]
    if not any(own):
        return CellOutcomes(cell, {}, (), {}, {}, {}, step_seconds)
    size, seeds = _size(cell, *own), sorted({*TEST_SEEDS, *(key["seed"] for key in own[1])})
    outcomes = {system.name: _outcome(cell, system, size, seeds, tuned, tested) for system in SYSTEMS.values()}
    curves = {name: _frontier(cell, SYSTEMS[name], size, tuned, varied) for name in outcomes}
    candidates = {name: _tried(study.tuning_runs(cell, [SYSTEMS[name]], size), tuned) for name in outcomes}
    edges = {
        name: _tried(study.edge_runs(cell, [outcome.system], size, tuned), tuned)
        for name, outcome in outcomes.items()
        if outcome.runs
    }
    return CellOutcomes(
        cell,
        {name: outcome for name, outcome in outcomes.items() if outcome.runs},
        (),
        {name: curve for name, curve in curves.items() if curve},
        {name: tried for name, tried in candidates.items() if tried},
        {name: tried for name, tried in edges.items() if tried},
        step_seconds,
    )


def _size(cell: Cell, tuned: Sequence[Mapping], tested: Sequence[Mapping]) -> Size:
    """The size that most results of the cell have, from their keys; the default is what nothing else is known of."""
    default = Size()
    both = [*tuned, *tested]
    steps = _commonest((key.get("steps", 300) for key in both), cell.steps)
    batch = _commonest((key.get("batch", 32) for key in both), default.batch)
    return Size(
        None if steps == cell.steps else steps,
        batch,
        _commonest((key.get("examples", 200) for key in tuned), default.tuning_examples),
        _commonest((key.get("examples", 200) for key in tested), default.examples),
    )


def _of(key: Mapping, cell: Cell) -> bool:
    named = (
        key["target"],
        key["method"].get("base", "adamw"),
        tuple(key.get("first", ())),
        key.get("reference", "renewed"),
    )
    begun = key.get("checkpoint", CHECKPOINT.name) in (path.name for path in CHECKPOINTS[cell.architecture])
    own = cell.target, cell.base, cell.first, cell.reference
    return begun and named == own and (key.get("steps") == LONG) == cell.long


def _commonest(values: Iterable[int], default: int) -> int:
    found = Counter(values).most_common(1)
    return found[0][0] if found else default


def _outcome(
    cell: Cell,
    system: System,
    size: Size,
    seeds: Sequence[int],
    tuned: dict[str, Result],
    tested: Mapping[str, Result],
) -> Outcome:
    try:
        method = study.chosen(cell, system, size, tuned)
    except ValueError:
        return Outcome(system, None, {}, TEST_SEEDS)
    keys = {seed: study.runs_of(cell, [method], [seed], size)[0].key for seed in seeds}
    runs = {seed: tested[key] for seed, key in keys.items() if key in tested}
    return Outcome(system, method, runs, tuple(seed for seed in TEST_SEEDS if seed not in runs))


def _frontier(
    cell: Cell, system: System, size: Size, tuned: dict[str, Result], varied: Mapping[str, Result]
) -> tuple[str, dict[float, list[Result]]] | None:
    if system.frontier is None:
        return None
    try:
        runs = study.frontier_runs(cell, [system], size, tuned)
    except ValueError:
        return None
    setting = system.frontier[0]
    found: dict[float, list[Result]] = {}
    for run in runs:
        if run.key in varied:
            found.setdefault(run.method.settings[setting], []).append(varied[run.key])
    return (setting, dict(sorted(found.items()))) if found else None


def _tried(runs: Sequence[Run], tuned: Mapping[str, Result]) -> list[Tried]:
    methods = list({str(run.method.settings): run.method for run in runs}.values())
    found = [(m, [tuned[run.key] for run in runs if run.method == m and run.key in tuned]) for m in methods]
    return [(method, results) for method, results in found if results]

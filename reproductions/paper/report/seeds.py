"""Several seeds of one row: means with 95 % intervals, and paired differences from the controls."""

from collections.abc import Iterable, Mapping, Sequence

from reproductions.methods import METHODS
from reproductions.paper.report.results import Result, unlike
from reproductions.paper.report.scores import summary
from reproductions.shared.stats import Difference, Estimate, estimate, paired
from reproductions.shared.tables import Table

CONTROLS = ("fine-tune", "fine-tune-low", "fine-tune-lv")
"""What others are compared with, seed by seed."""
QUANTITIES = {"P": "P", "T": "T", "H": "H(P, T)"}


def quantities(run: Result, tasks: Sequence[str]) -> dict[str, float]:
    """P, T and H(P, T) of a run; empty where a score is missing."""
    scores = run.scores
    if not set(tasks) <= set(scores):
        return {}
    found = summary([scores[task] for task in tasks])
    return {"P": found.retained, "T": found.target, "H": found.h("H(P, T)")}


def by_seed(runs: Iterable[Result], tasks: Sequence[str]) -> dict[int, dict[str, float]]:
    """Seed -> quantities, of complete runs."""
    return {run.seed: found for run in runs if (found := quantities(run, tasks))}


def seed_table(title: str, runs: Mapping[str, Sequence[Result]], tasks: Sequence[str]) -> Table | None:
    """Means, and what each method has more than each control on the same seeds; None where no method has two seeds.

    Args:
        title: of the experiment.
        runs: all runs of an experiment, by method.
        tasks: its data sets, the target last.
    """
    values = {method: found for method, some in runs.items() if (found := by_seed(some, tasks))}
    if all(len(found) < 2 for found in values.values()):
        return None
    controls = [name for name in CONTROLS if name in values]
    columns = ["method", "seeds", *QUANTITIES.values()]
    columns += [f"{QUANTITIES[q]} against {METHODS[control].title}" for control in controls for q in ("P", "T", "H")]
    rows = []
    for method, found in values.items():
        means = [_mean(found, quantity) for quantity in QUANTITIES]
        apart = [_apart(method, control, values, quantity) for control in controls for quantity in ("P", "T", "H")]
        title_of = METHODS[method].title if method in METHODS else method
        rows.append((title_of, str(len(found)), *(f"{mean:.1f}" for mean in means), *apart))
    smoke = any(run.smoke for some in runs.values() for run in some)
    notes = ["± half a 95 % interval over seeds; differences are paired, seed by seed, on the same examples."]
    notes += unlike(runs)
    notes += ["Smoke: tiny random models on drawn pictures; shows that everything runs, and nothing else."] * smoke
    return Table(f"{title}: seeds", tuple(columns), tuple(rows), tuple(notes))


def _mean(found: Mapping[int, Mapping[str, float]], quantity: str) -> Estimate:
    return estimate([values[quantity] for values in found.values()])


def _apart(method: str, control: str, values: Mapping[str, Mapping[int, Mapping[str, float]]], quantity: str) -> str:
    one, other = values[method], values[control]
    if method == control or not one.keys() & other.keys():
        return "–"
    difference: Difference = paired(
        {seed: x[quantity] for seed, x in one.items()}, {seed: x[quantity] for seed, x in other.items()}
    )
    return f"{difference:+.1f}"

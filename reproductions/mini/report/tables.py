"""The study's tables."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

from reproductions.mini.experiment.outcomes import SCORES, CellOutcomes, Outcome
from reproductions.mini.experiment.scores import mean
from reproductions.mini.experiment.systems import SHORT, SYSTEMS
from reproductions.mini.report.divergence import correlation, diverged
from reproductions.mini.report.grouping import ALL, by_architecture
from reproductions.mini.report.verdicts import FEWEST_SEEDS
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.shared.results import Result
from reproductions.shared.stats import FEWEST_MODELS, POWER, Difference, estimate, holm
from reproductions.shared.tables import Table

NONE = "–"
KNOWS = {
    "examples": "† Knows examples of the old tasks.",
    "questions": "‡ Knows how the old tasks' questions are asked, but none of their pictures or answers.",
}
ASKS = (
    "What has no mark knows nothing of the old tasks: where it needs prompts or the old model's own answers, they are "
    "random words of the vocabulary about the task's pictures, or the task's own prompts."
)
SCORED = ("T", "P exact", "P restricted", "Avg", "H", "H LLaVA", "H MiniCPM")
SOMETIMES = ("T of the first", "T of the second", "P of facts")
"""What a sequence of targets has kept of those before, and what is kept of questions without a picture."""
RIVALS = ("fine-tune-low", "align")
COMPARED = ("T", "P", "H")


def tables(cell: CellOutcomes) -> list[Table]:
    """All tables of a cell: scores, form and sight, costs and features, and differences from rivals.

    Where results hold them, the divergence on the new task and values beyond edges too.
    """
    if not cell.systems:
        return []
    return [_explained(table) for table in _tables(cell)]


def _explained(table: Table) -> Table:
    """With notes on the marks that are there, and on what stands without one."""
    rows = {row[0] for row in table.rows}
    there = [system for system in SYSTEMS.values() if system.marked in rows]
    notes = [note for knows, note in KNOWS.items() if any(system.knows == knows for system in there)]
    if any(system.method.asks and not system.knows for system in there):
        notes.append(ASKS)
    return replace(table, notes=(*table.notes, *notes))


def _tables(cell: CellOutcomes) -> list[Table]:
    rivals = [rival for rival in RIVALS if rival in cell.systems]
    edges = [edge_table(cell)] if cell.edges else []
    razor = [divergence_table(cell)] if diverged(cell) else []
    return [
        score_table(cell),
        form_table(cell),
        cost_table(cell),
        *razor,
        *(difference_table(cell, rival) for rival in rivals),
        *edges,
    ]


def summaries(cells: Sequence[CellOutcomes]) -> list[Table]:
    """A summary of each architecture that was tested; of cells that pool several there is none."""
    groups = {name: own for name, own in by_architecture(cells).items() if own[0].cell.architecture != ALL}
    return [summary_table(own, f"Summary: {name}" if len(groups) > 1 else "Summary") for name, own in groups.items()]


def summary_table(cells: Sequence[CellOutcomes], title: str = "Summary") -> Table:
    """Every system that was tested in one of the cells: T, P and H with AdamW, H with SGD, costs of the first.

    Cells without results are left out.
    """
    shown = [cell for cell in cells if cell.systems]
    wanted = [
        (cell, measure) for cell in shown for measure in (COMPARED if cell.cell.base == "adamw" else COMPARED[-1:])
    ]
    names = [name for name in SYSTEMS if any(name in cell.systems for cell in shown)]
    rows = [
        (
            SYSTEMS[name].marked,
            *(_brief(cell, name, measure) for cell, measure in wanted),
            *((NONE, NONE) if name not in shown[0].systems else _costs(shown[0], name)),
        )
        for name in names
    ]
    columns = ("system", *(f"{cell.title}: {measure}" for cell, measure in wanted), "step time", "memory")
    note = (
        "Test scores in percent, mean over seeds; H, the harmonic mean of T and P, with half its 95 % interval. P is "
        "exact after digits and restricted after captions. Step time and memory beyond the weights are multiples of "
        f"Fine-tune's ({shown[0].title})."
    )
    return _explained(Table(title, columns, tuple(rows), (note,)))


def _brief(cell: CellOutcomes, name: str, measure: str) -> str:
    if name not in cell.systems:
        return NONE
    cell_ = _estimate(cell.systems[name], measure)
    return cell_ if measure == COMPARED[-1] else cell_.split()[0]


def _costs(cell: CellOutcomes, name: str) -> tuple[str, str]:
    return _times(cell, cell.systems[name]), _memory(cell, cell.systems[name])


def score_table(cell: CellOutcomes) -> Table:
    """Scores of every system that was tested, mean ± 95 % interval over seeds."""
    there = (m for m in SOMETIMES if any(o.values(m) for o in cell.systems.values()))
    scored = (*SCORED, *there)
    rows = [
        (o.system.marked, chosen_settings(o), *(_estimate(o, measure) for measure in scored), _seeds(o))
        for o in cell.systems.values()
    ]
    caption = cell.cell.target == "caption"
    notes = [
        "Percent, mean ± half a 95 % t-interval over seeds. "
        + (
            "T is the share of right content words, and Avg and the H-scores take P restricted."
            if caption
            else "T is exact match, and Avg and the H-scores take P exact."
        )
        + " H of P and T; H LLaVA of P and Avg; H MiniCPM of Avg and T.",
        *missing(cell),
    ]
    return Table(f"{cell.title}: scores", ("system", "settings", *scored, "seeds"), tuple(rows), tuple(notes))


def form_table(cell: CellOutcomes) -> Table:
    """Of every pre-trained task, answers in the right form, and answers that are right among the task's own."""
    rows = []
    for o in cell.systems.values():
        runs = [run for run in o.runs.values() if "failed" not in run]
        rows.append((o.system.marked, *(_form_and_sight(runs, task) for task in PRETRAINED_TASKS)))
    note = (
        "Percent, means over the seeds that did not diverge: answers that are right word for word, which takes sight "
        "and the form of the answer, / questions whose right answer is the likeliest of the task's own, which takes "
        "sight alone."
    )
    return Table(f"{cell.title}: form and sight by task", ("system", *PRETRAINED_TASKS), tuple(rows), (note,))


def _form_and_sight(runs: Sequence[Result], task: str) -> str:
    if not runs:
        return NONE
    return " / ".join(f"{fmean(run[kind][task] for run in runs):.0f}" for kind in ("exact", "restricted"))


def divergence_table(cell: CellOutcomes) -> Table:
    """How far the answers to the target's prompts have moved, beside what was forgotten."""
    found = diverged(cell)
    rows = [
        (SYSTEMS[name].marked, f"{estimate(list(kl.values())):.3f}", f"{lost:+.1f}")
        for name, (kl, lost) in found.items()
    ]
    note = (
        "KL(p_φ ‖ p_θ) in nats a token at the pre-trained model's own answers to the target's test prompts, and the "
        f"change of P on the same seeds. {correlation(found)}"
    )
    return Table(f"{cell.title}: KL on the new task, and forgetting", ("system", "KL", "ΔP"), tuple(rows), (note,))


def cost_table(cell: CellOutcomes) -> Table:
    """Ranks before and after, drift, and what the training cost beside plain fine-tuning."""
    columns = ("system", "rank, scenes", f"rank, {cell.cell.target}", "drift, %", "trained", "step time", "memory")
    rows = [
        (
            o.system.marked,
            _ranks(cell, o, "rank, scenes"),
            _ranks(cell, o, "rank, target"),
            _estimate(o, "drift"),
            f"{max((run.get('trained', 0) for run in o.runs.values()), default=0):,}",
            _times(cell, o),
            _memory(cell, o),
        )
        for o in cell.systems.values()
    ]
    note = (
        "Effective rank of the visual features: pre-trained → fine-tuned (change on the same seeds). Drift: mean "
        "|z − z_pre| over mean |z_pre|, mean over all tasks. Step time (processor time, all systems in turn in one "
        "process) and peak memory beyond the weights are multiples of Fine-tune's."
    )
    return Table(f"{cell.title}: features and costs", columns, tuple(rows), (note,))


def difference_table(cell: CellOutcomes, rival: str) -> Table:
    """Paired differences from a rival on the same seeds, with p-values corrected within each measure."""
    others = [n for n in cell.systems if n not in (rival, "zero-shot") and not cell.same(n, rival)]
    alike = [n for n in cell.systems if n not in (rival, "zero-shot") and cell.same(n, rival)]
    found = {m: [cell.difference(m, name, rival) for name in others] for m in COMPARED}
    # Two differences are equal by chance now and then, as scores are counts, and that is no evidence.
    adjusted = {m: holm([d.p if d and d.n >= FEWEST_SEEDS else math.nan for d in found[m]]) for m in COMPARED}
    rows = []
    for i, name in enumerate(others):
        cells = [part for m in COMPARED for part in (_difference(found[m][i]), _p(adjusted[m][i]))]
        seeds = found["H"][i]
        rows.append((SYSTEMS[name].marked, *cells, str(seeds.n if seeds else 0)))
    counted = sum(not math.isnan(p) for p in adjusted["H"])
    notes = [
        f"Difference in points on the same seeds ± half a 95 % interval; p of a two-sided paired t-test, from "
        f"{FEWEST_SEEDS} seeds on, Holm-corrected for the {counted} comparisons of this table, measure by measure. "
        f"The intervals are not corrected. {_unit(found['H'])}"
    ]
    detectable = sorted(d.detectable for d in found["H"] if d and d.n >= FEWEST_SEEDS and not math.isnan(d.half))
    if detectable:
        notes.append(
            f"With {POWER:.0%} power, and before the correction, such a test finds a ΔH of {median(detectable):.1f} or "
            f"more (the median of the comparisons; from {detectable[0]:.1f} to {detectable[-1]:.1f})."
        )
    if alike:
        notes.append(f"Chose the same settings, and so is the same: {'; '.join(SYSTEMS[n].label for n in alike)}.")
    columns = ("system", *(column for m in COMPARED for column in (f"Δ{m}", "p")), "seeds")
    return Table(f"{cell.title}: differences from {SYSTEMS[rival].label}", columns, tuple(rows), tuple(notes))


def _unit(found: Sequence[Difference | None]) -> str:
    models = max((d.models for d in found if d), default=0)
    if models >= FEWEST_MODELS:
        return f"The unit is the pre-trained model, of which there are {models}."
    return f"The unit is the seed: {models} pre-trained model{'s' * (models != 1)} are no sample of models."


def edge_table(cell: CellOutcomes) -> Table:
    """Settings one value beyond an edge at which a system's were chosen, against those."""
    rows = []
    for name, found in cell.edges.items():
        outcome = cell.systems[name]
        (before,) = (results for method, results in cell.tuning[name] if method == outcome.method)
        for method, results in found:
            H = [mean(each, SCORES["H"]) for each in (before, results)]
            scores = [f"{mean(results, SCORES[measure]):.1f}" for measure in ("T", "P")]
            beyond = chosen_settings(replace(outcome, method=method))
            rows.append(
                (outcome.system.marked, chosen_settings(outcome), f"{H[0]:.1f}", beyond, *scores, f"{H[1]:.1f}")
            )
    note = (
        "Validation examples, mean of two seeds. Where a setting was chosen at the edge of what was tried, the next "
        "value beyond, by the ratio to its neighbour. Nothing was chosen by these."
    )
    columns = ("system", "chosen", "H", "beyond", "T there", "P there", "H there")
    return Table(f"{cell.title}: beyond the edges of what was tried", columns, tuple(rows), (note,))


def missing(cell: CellOutcomes) -> list[str]:
    """What the study has not run of a cell, and what diverged, a sentence each."""
    told = []
    if cell.untested:
        told.append(f"Not tested yet: {'; '.join(cell.untested)}.")
    lacking: dict[tuple[int, ...], list[str]] = {}
    for outcome in cell.systems.values():
        if outcome.missing:
            lacking.setdefault(outcome.missing, []).append(outcome.system.label)
    for seeds, labels in lacking.items():
        told.append(f"Seeds {', '.join(map(str, seeds))} are missing of {'; '.join(labels)}.")
    for outcome in cell.systems.values():
        if outcome.diverged:
            which = ", ".join(map(str, outcome.diverged))
            told.append(f"{outcome.system.label} diverged on seed {which}, which counts as zero.")
    return told


def chosen_settings(outcome: Outcome) -> str:
    """What the system's grid left open, as it was chosen."""
    if outcome.method is None or not outcome.system.grid:
        return ""
    settings = outcome.method.settings
    open_ = [name for name, values in outcome.system.grid.items() if len(values) > 1]
    return ", ".join(f"{SHORT.get(name, name)} {settings[name]:g}" for name in open_)


def _seeds(outcome: Outcome) -> str:
    if outcome.system.name == "zero-shot":
        return f"{len({run['key'] for run in outcome.runs.values()})} models"
    return str(len(outcome.runs))


def _estimate(outcome: Outcome, measure: str) -> str:
    values = list(outcome.values(measure).values())
    if not values:
        return NONE
    # Two pre-trained models are what there is of a model that is not trained, and no sample.
    return f"{fmean(values):.1f}" if outcome.system.name == "zero-shot" else f"{estimate(values)}"


def _ranks(cell: CellOutcomes, outcome: Outcome, measure: str) -> str:
    after = outcome.values(measure)
    before = cell.systems["zero-shot"].values(measure) if "zero-shot" in cell.systems else {}
    if not after or outcome.system.name == "zero-shot":
        return _estimate(outcome, measure)
    both = after.keys() & before.keys()
    mean = f"{fmean(after.values()):.1f}"
    if not both:
        return mean
    change = estimate([after[seed] - before[seed] for seed in both])
    return f"{fmean(before[seed] for seed in both):.1f} → {mean} ({change:+.1f})"


def _times(cell: CellOutcomes, outcome: Outcome) -> str:
    mine, plain = (cell.step_seconds.get(name) for name in (outcome.system.name, "fine-tune"))
    return f"{mine / plain:.2f} ×" if mine and plain else NONE


def _memory(cell: CellOutcomes, outcome: Outcome) -> str:
    mine = outcome.values("peak bytes")
    plain = cell.systems["fine-tune"].values("peak bytes") if "fine-tune" in cell.systems else {}
    ratios = [mine[seed] / plain[seed] for seed in mine.keys() & plain.keys() if plain[seed]]
    return f"{fmean(ratios):.2f} ×" if ratios and outcome.system.name != "zero-shot" else NONE


def _difference(found: Difference | None) -> str:
    return f"{found:+.1f}" if found else NONE


def _p(p: float) -> str:
    return NONE if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"

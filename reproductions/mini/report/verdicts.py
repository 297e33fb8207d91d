"""Verdicts on the claims by one rule: where a 95 % interval lies, seen from a boundary."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from reproductions.mini.experiment.outcomes import SCORES, CellOutcomes
from reproductions.mini.experiment.scores import mean
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.report.claims import (
    BEST,
    CLAIMS,
    CORRELATION,
    H_MARGIN,
    KL_MEASURES_FORGETTING,
    MARGIN,
    RANK_MEASURES_FORGETTING,
    RECOMMENDATION,
    RIVALS,
    Claim,
    Condition,
)
from reproductions.mini.report.divergence import diverged
from reproductions.shared.stats import FEWEST_MODELS, POWER, Estimate, holm, spearman

Outcome = Literal["holds here", "does not hold here", "cannot tell"]
FEWEST_SEEDS = 3
LEVEL = 0.05
_FEWEST_SYSTEMS = 6

RULE = (
    "A claim is one or more differences in points, paired, each with a boundary. This is 0; but to keep or learn as "
    f"much is to lose less than {MARGIN:g} points of P or T, to do no worse, as well or within a point to lose less "
    f"than {H_MARGIN:g} of H, and to add nothing to gain less than that. It holds here if every 95 % interval lies "
    "wholly on the claimed side of its boundary, and does not hold here if one lies wholly on the other side; "
    f"otherwise, or with fewer than {FEWEST_SEEDS} pairs, one cannot tell, and the evidence says how far from the "
    f"boundary a mean would have to lie to be found with {POWER:.0%} power before the correction (detectable). Either "
    "verdict has to stand after Holm's correction at 5 % for all claims that could be judged in this column: p is that "
    "of the weakest condition for a claim that holds, and that of the clearest, times the number of conditions, for "
    "one that does not. The unit is the pre-trained model, and a model's value is the mean over its seeds, where there "
    f"are {FEWEST_MODELS} models or more. Fewer are no sample: there the unit is the seed, each model's mean has to "
    "lie on the same side as the verdict, and what is found is found of these models. All runs are measured by the "
    "same test examples, so that intervals are of training alone. The best other system is the best on validation "
    f"examples. A correlation over systems has to lie beyond {CORRELATION:g}; they count as independent, though some "
    "are variants of others, and once if they share their runs. P is exact after digits and restricted after captions; "
    "T is exact for digits, and the share of right content words for captions. † and ‡ know examples of the old tasks, "
    "and how their questions are asked."
)


@dataclass(frozen=True)
class Verdict:
    """A claim held against a cell's results.

    Attributes:
        claim: what is claimed.
        outcome: whether it holds.
        rule: in words, with the boundaries.
        evidence: the numbers with their 95 % intervals, or what is missing.
        p: of the outcome, or of what the outcome would be; NaN if nothing was measured.
    """

    claim: Claim
    outcome: Outcome
    rule: str
    evidence: str
    p: float = math.nan


def verdicts(cell: CellOutcomes, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """Every claim in a cell, in order, corrected for their number."""
    found = [_CORRELATIONS[claim](cell) if claim in _CORRELATIONS else _judge(claim, cell) for claim in claims]
    return [_corrected(v, p) for v, p in zip(found, holm([v.p for v in found]), strict=True)]


def _corrected(verdict: Verdict, p: float) -> Verdict:
    """With Holm's p, at which an outcome has to stand."""
    if math.isnan(p):
        return verdict
    told = f"{verdict.evidence}; p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    if p < LEVEL or verdict.outcome == "cannot tell":
        return replace(verdict, evidence=told, p=p)
    return replace(verdict, outcome="cannot tell", evidence=f"{told}, {verdict.outcome} before the correction", p=p)


def claims_of(cells: Sequence[CellOutcomes]) -> list[Claim]:
    """All claims of the first edition, and of the younger ones those whose systems were tested."""
    tested = {name for cell in cells for name in cell.systems}
    measured = {KL_MEASURES_FORGETTING: any(len(diverged(cell)) >= _FEWEST_SYSTEMS for cell in cells)}
    younger = [
        claim
        for claim in (*RECOMMENDATION, *RIVALS)
        if claim not in CLAIMS and measured.get(claim, all({c.system, c.baseline} <= tested for c in claim.conditions))
    ]
    return [*CLAIMS, *younger]


def against(found: Estimate, side: Literal[">", "<"], boundary: float) -> Outcome:
    """Where the interval lies: wholly on the claimed side of the boundary, wholly on the other, or neither.

    Neither, too, for an interval that touches it or that fewer than three seeds make.
    """
    if found.n < FEWEST_SEEDS or math.isnan(found.half) or found.low <= boundary <= found.high:
        return "cannot tell"
    return "holds here" if (found.low > boundary) == (side == ">") else "does not hold here"


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Of conditions that have to hold together; one that fails is enough."""
    if "does not hold here" in outcomes:
        return "does not hold here"
    return "holds here" if set(outcomes) == {"holds here"} else "cannot tell"


def _judge(claim: Claim, cell: CellOutcomes) -> Verdict:
    judged = [_condition(condition, cell) for condition in claim.conditions]
    outcome = together([each.outcome for each in judged])
    return Verdict(
        claim,
        outcome,
        "; ".join(map(rule, claim.conditions)),
        "; ".join(dict.fromkeys(each.evidence for each in judged)),
        _p(judged),
    )


@dataclass(frozen=True)
class _Judged:
    """A condition held against a cell's results.

    Attributes:
        outcome: where its interval lies.
        evidence: its number, or what is missing.
        p: of the two-sided test against its boundary; NaN if that is not tested.
        claimed: whether the mean lies on the claimed side.
    """

    outcome: Outcome
    evidence: str
    p: float = math.nan
    claimed: bool = False


def _p(judged: Sequence[_Judged]) -> float:
    """Of conditions that have to hold together: the largest; of some that fail, the least, times their number."""
    if any(math.isnan(each.p) for each in judged):
        return math.nan
    failing = [each.p for each in judged if not each.claimed]
    return min(1.0, len(judged) * min(failing)) if failing else max(each.p for each in judged)


def rule(condition: Condition) -> str:
    """A condition in words."""
    label = BEST if condition.baseline == BEST else SYSTEMS[condition.baseline].marked
    boundary = f"{condition.boundary:+g}" if condition.boundary else "0"
    return f"{condition.measure} of {SYSTEMS[condition.system].marked} − {label} {condition.side} {boundary}"


def _condition(condition: Condition, cell: CellOutcomes) -> _Judged:
    baseline = _best_other(cell, condition.system) or BEST if condition.baseline == BEST else condition.baseline
    lacking = [name for name in (condition.system, baseline) if name not in cell.systems]
    if lacking:
        missing = "; ".join(SYSTEMS[name].label if name in SYSTEMS else name for name in lacking)
        return _Judged("cannot tell", f"not measured: {missing}")
    if cell.same(condition.system, baseline):
        labels = [SYSTEMS[name].label for name in (condition.system, baseline)]
        return _Judged("cannot tell", f"{' and '.join(labels)} chose the same settings")
    found = cell.difference(condition.measure, condition.system, baseline)
    if found is None:
        return _Judged("cannot tell", f"Δ{condition.measure}: no seed in common")
    means = _by_model(condition, baseline, cell)
    outcome = against(found, condition.side, condition.boundary)
    claimed = (found.mean > condition.boundary) == (condition.side == ">")
    if found.models < FEWEST_MODELS and any(
        (x > condition.boundary) != (found.mean > condition.boundary) for x in means.values()
    ):
        outcome = "cannot tell"
    chosen = f" to {SYSTEMS[baseline].label}" if condition.baseline == BEST else ""
    told = [f"n = {found.n}"]
    if len(means) > 1:
        told.append(", ".join(f"{model} {x:+.1f}" for model, x in means.items()))
    if outcome == "cannot tell" and not math.isnan(found.detectable):
        told.append(f"detectable {found.detectable:.1f}")
    text = f"Δ{condition.measure}{chosen} {found:+.1f} ({'; '.join(told)})"
    tested = found.n >= FEWEST_SEEDS and not math.isnan(found.half)
    return _Judged(outcome, text, found.p_against(condition.boundary) if tested else math.nan, claimed)


def _by_model(condition: Condition, baseline: str, cell: CellOutcomes) -> dict[str, float]:
    """The mean difference on each pre-trained model."""
    pair = [cell.systems[name].values(condition.measure) for name in (condition.system, baseline)]
    models, found = cell.systems[condition.system].models, dict[str, list[float]]()
    for seed in sorted(pair[0].keys() & pair[1].keys()):
        found.setdefault(models[seed], []).append(pair[0][seed] - pair[1][seed])
    return {model: fmean(values) for model, values in found.items()}


def best(cell: CellOutcomes) -> str | None:
    """The system with the highest mean H among those that know nothing of the old tasks and have enough seeds."""
    means = {name: fmean(cell.systems[name].values("H").values()) for name in _unknowing(cell)}
    return max(means, key=means.__getitem__, default=None)


def _best_other(cell: CellOutcomes, name: str) -> str | None:
    """Of the same systems, but this, the one whose chosen settings have the highest mean H on validation examples."""
    means = {
        other: mean(results, SCORES["H"])
        for other in _unknowing(cell)
        for method, results in cell.tuning.get(other, ())
        if other != name and method == cell.systems[other].method
    }
    return max(means, key=means.__getitem__, default=None)


def _unknowing(cell: CellOutcomes) -> list[str]:
    return [
        name
        for name, outcome in cell.systems.items()
        if name != "zero-shot" and not outcome.system.knows and len(outcome.runs) >= FEWEST_SEEDS
    ]


def _rank_correlation(cell: CellOutcomes) -> Verdict:
    """ρ of mean rank change and mean change of P."""
    words = f"Spearman's ρ over systems of Δrank and ΔP > {CORRELATION}"
    return _correlated(RANK_MEASURES_FORGETTING, words, list(rank_and_forgetting(cell).values()), ">", CORRELATION)


def _divergence_correlation(cell: CellOutcomes) -> Verdict:
    """ρ of mean KL on the new task and mean change of P."""
    words = f"Spearman's ρ over systems of KL on the new task and ΔP < -{CORRELATION}"
    pairs = [(fmean(kl.values()), lost) for kl, lost in diverged(cell).values() if len(kl) >= FEWEST_SEEDS]
    return _correlated(KL_MEASURES_FORGETTING, words, pairs, "<", -CORRELATION)


def _correlated(
    claim: Claim, words: str, pairs: Sequence[tuple[float, float]], side: Literal[">", "<"], boundary: float
) -> Verdict:
    """Spearman's ρ over systems, with the interval of Bonett and Wright."""
    if len(pairs) < _FEWEST_SYSTEMS:
        return Verdict(claim, "cannot tell", words, f"{len(pairs)} systems with {FEWEST_SEEDS} seeds")
    found = spearman(pairs)
    if math.isnan(found.rho):
        return Verdict(claim, "cannot tell", words, f"no variation over {len(pairs)} systems")
    outcome: Outcome = "cannot tell"
    if not found.low <= boundary <= found.high:
        outcome = "holds here" if (found.low > boundary) == (side == ">") else "does not hold here"
    return Verdict(claim, outcome, words, f"ρ = {found}, over {len(pairs)} systems", found.p_against(boundary))


_CORRELATIONS: dict[Claim, Callable[[CellOutcomes], Verdict]] = {
    RANK_MEASURES_FORGETTING: _rank_correlation, KL_MEASURES_FORGETTING: _divergence_correlation,
}  # fmt: skip


def rank_and_forgetting(cell: CellOutcomes) -> dict[str, tuple[float, float]]:
    """By system with enough seeds: mean changes of effective rank and of P from the pre-trained model's.

    Systems that share their runs count once.
    """
    found = {}
    for name in cell.distinct:
        rank, P = (cell.difference(measure, name, "zero-shot") for measure in ("rank", "P"))
        if name != "zero-shot" and rank and P and min(rank.n, P.n) >= FEWEST_SEEDS:
            found[name] = (rank.mean, P.mean)
    return found

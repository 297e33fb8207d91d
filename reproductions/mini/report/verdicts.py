"""Verdicts on the claims by one rule: where a 95 % interval lies, seen from a boundary."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reproductions.mini.experiment.outcomes import CellOutcomes
from reproductions.mini.experiment.study import checkpoint_of
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.report.claims import (
    BEST,
    CLAIMS,
    CORRELATION,
    RANK_MEASURES_FORGETTING,
    RECOMMENDATION,
    Claim,
    Condition,
)
from reproductions.shared.stats import Estimate, estimate, spearman

Outcome = Literal["holds here", "does not hold here", "cannot tell"]
FEWEST_SEEDS = 3
_FEWEST_SYSTEMS = 6

RULE = (
    "A claim is one or more differences, paired over seeds, each with a boundary. It holds here if every 95 % interval "
    "lies wholly on the claimed side of its boundary, does not hold here if one lies wholly on the other side, and "
    f"otherwise, or with fewer than {FEWEST_SEEDS} seeds, one cannot tell. The intervals are not adjusted for the "
    "number of claims. P is exact after digits and restricted after captions; T is exact for digits, and the share of "
    "right content words for captions."
)


@dataclass(frozen=True)
class Verdict:
    """A claim held against a cell's results.

    Attributes:
        claim: what is claimed.
        outcome: whether it holds.
        rule: in words, with the boundaries.
        evidence: the numbers with their 95 % intervals, or what is missing.
    """

    claim: Claim
    outcome: Outcome
    rule: str
    evidence: str


def verdicts(cell: CellOutcomes, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """Every claim in a cell, in order."""
    return [_correlation(cell) if c is RANK_MEASURES_FORGETTING else _judge(c, cell) for c in claims]


def claims_of(cells: Sequence[CellOutcomes]) -> list[Claim]:
    """All claims, and of those of the recommendation, which are younger than the first results, what was tested."""
    tested = {name for cell in cells for name in cell.systems}
    younger = [
        claim
        for claim in RECOMMENDATION
        if claim not in CLAIMS and all({c.system, c.baseline} <= tested for c in claim.conditions)
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
    outcomes, evidence = zip(*(_condition(condition, cell) for condition in claim.conditions), strict=True)
    return Verdict(
        claim, together(outcomes), "; ".join(map(rule, claim.conditions)), "; ".join(dict.fromkeys(evidence))
    )


def rule(condition: Condition) -> str:
    """A condition in words."""
    label = BEST if condition.baseline == BEST else SYSTEMS[condition.baseline].label
    boundary = f"{condition.boundary:+g}" if condition.boundary else "0"
    return f"{condition.measure} of {SYSTEMS[condition.system].label} − {label} {condition.side} {boundary}"


def _condition(condition: Condition, cell: CellOutcomes) -> tuple[Outcome, str]:
    baseline = best(cell, condition.system) or BEST if condition.baseline == BEST else condition.baseline
    lacking = [name for name in (condition.system, baseline) if name not in cell.systems]
    if lacking:
        return "cannot tell", f"not measured: {'; '.join(SYSTEMS[n].label if n in SYSTEMS else n for n in lacking)}"
    if cell.same(condition.system, baseline):
        return "cannot tell", f"{SYSTEMS[condition.system].label} and {SYSTEMS[baseline].label} chose the same settings"
    found = cell.difference(condition.measure, condition.system, baseline)
    if found is None:
        return "cannot tell", f"Δ{condition.measure}: no seed in common"
    chosen = f" to {SYSTEMS[baseline].label}" if condition.baseline == BEST else ""
    text = f"Δ{condition.measure}{chosen} {found:+.1f} (n = {found.n}{_by_checkpoint(condition, baseline, cell)})"
    return against(found, condition.side, condition.boundary), text


def _by_checkpoint(condition: Condition, baseline: str, cell: CellOutcomes) -> str:
    """The means on each pre-trained model, since seeds on one share it and are not wholly independent."""
    pair = [cell.systems[name].values(condition.measure) for name in (condition.system, baseline)]
    found: dict[str, list[float]] = {}
    for seed in sorted(pair[0].keys() & pair[1].keys()):
        found.setdefault(checkpoint_of(seed).name, []).append(pair[0][seed] - pair[1][seed])
    if len(found) < 2:
        return ""
    return "; " + ", ".join(f"{name} {estimate(values).mean:+.1f}" for name, values in found.items())


def best(cell: CellOutcomes, other_than: str = "") -> str | None:
    """The system with the highest mean H among those that know nothing of the old tasks and have enough seeds."""
    means = {
        name: estimate(list(outcome.values("H").values())).mean
        for name, outcome in cell.systems.items()
        if name not in (other_than, "zero-shot") and not outcome.system.knows and len(outcome.runs) >= FEWEST_SEEDS
    }
    return max(means, key=means.__getitem__, default=None)


def _correlation(cell: CellOutcomes) -> Verdict:
    """Spearman's ρ over systems of mean rank change and mean change of P, with the interval of Bonett and Wright."""
    claim, words = RANK_MEASURES_FORGETTING, f"Spearman's ρ over systems of Δrank and ΔP > {CORRELATION}"
    pairs = rank_and_forgetting(cell)
    if len(pairs) < _FEWEST_SYSTEMS:
        return Verdict(claim, "cannot tell", words, f"{len(pairs)} systems with {FEWEST_SEEDS} seeds")
    found = spearman(list(pairs.values()))
    if math.isnan(found.rho):
        return Verdict(claim, "cannot tell", words, f"no variation over {len(pairs)} systems")
    outcome: Outcome = "cannot tell"
    if found.low > CORRELATION:
        outcome = "holds here"
    elif found.high < CORRELATION:
        outcome = "does not hold here"
    return Verdict(claim, outcome, words, f"ρ = {found}, over {len(pairs)} systems")


def rank_and_forgetting(cell: CellOutcomes) -> dict[str, tuple[float, float]]:
    """By system with enough seeds: mean changes of effective rank and of P from the pre-trained model's."""
    found = {}
    for name in cell.systems:
        rank, P = (cell.difference(measure, name, "zero-shot") for measure in ("rank", "P"))
        if name != "zero-shot" and rank and P and min(rank.n, P.n) >= FEWEST_SEEDS:
            found[name] = (rank.mean, P.mean)
    return found

"""Means with intervals, and paired comparisons on the same seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        half: half the width of its 95 % interval, from Student's t; NaN for one value.
        n: how many values.
    """

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __format__(self, spec: str) -> str:
        spec = spec or ".1f"
        return format(self.mean, spec) + ("" if math.isnan(self.half) else f" ± {self.half:{spec.lstrip('+')}}")


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean of paired differences, with the p-value of the two-sided paired t-test; NaN for one pair."""

    p: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t-interval.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("estimate: no values")
    n = len(values)
    if n == 1:
        return Estimate(float(values[0]), math.nan, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * stats.sem(values))
    return Estimate(float(np.mean(values)), half, n)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """What `values` have more than `baseline` on the seeds that both have.

    Seeds share their checkpoint, their batches and the examples that measure, so that differences vary less than
    scores. Differences that are all zero have p = 1.

    Raises:
        ValueError: no seed in common.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        raise ValueError("paired: no seed in common")
    differences = [values[seed] - baseline[seed] for seed in seeds]
    found = estimate(differences)
    p = math.nan
    if len(seeds) > 1:
        # One sample of differences is what a paired test tests; where they do not vary, it has no t to speak of.
        same = max(differences) == min(differences)
        p = float(differences[0] == 0) if same else float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(found.mean, found.half, found.n, p)


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ with the 95 % interval of Bonett and Wright (2000); all NaN where nothing varies."""

    rho: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rho:.2f}, {self.low:.2f} to {self.high:.2f}"


def spearman(pairs: Sequence[tuple[float, float]]) -> Correlation:
    """Rank correlation of pairs.

    Raises:
        ValueError: fewer than four, which have no interval.
    """
    if len(pairs) < 4:
        raise ValueError(f"spearman: at least four pairs have an interval, got {len(pairs)}")
    if any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return Correlation(math.nan, math.nan, math.nan)
    rho = float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    inside = max(-0.999999, min(0.999999, rho))
    reach = stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt((1 + inside**2 / 2) / (len(pairs) - 3))
    low, high = (math.tanh(math.atanh(inside) + sign * reach) for sign in (-1, 1))
    return Correlation(rho, low, high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down method, in the order given; NaN stays, and counts as none.

    The i-th smallest of m is multiplied by m − i + 1, and none may be below one before it.
    """
    adjusted = list(p_values)
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    highest = 0.0
    for place, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - place) * p))
        adjusted[i] = highest
    return adjusted

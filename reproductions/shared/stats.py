"""Means with intervals, and paired comparisons on the same seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95
POWER = 0.8
FEWEST_MODELS = 3
"""That are a sample of models."""


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
    """A mean of paired differences.

    Attributes:
        error: its standard error; NaN for one value.
        freedom: degrees of freedom of Student's t.
        models: how many pre-trained models the differences come from; from three on they are the values.
    """

    error: float
    freedom: int
    models: int = 1

    @property
    def p(self) -> float:
        """Of the two-sided paired t-test; NaN for one pair."""
        return self.p_against(0.0)

    def p_against(self, boundary: float) -> float:
        """Of the two-sided test that the mean is `boundary`. Differences that do not vary have p = 1 or 0."""
        if not self.error > 0:
            return math.nan if math.isnan(self.error) else float(math.isclose(self.mean, boundary, abs_tol=1e-12))
        return float(2 * stats.t.sf(abs(self.mean - boundary) / self.error, self.freedom))

    @property
    def detectable(self) -> float:
        """How far from a boundary a mean has to lie to be found with `POWER`, by a two-sided test at 5 %.

        (t of 97.5 % + t of the power) times the standard error; NaN for one value.
        """
        return float(sum(stats.t.ppf(share, self.freedom) for share in ((1 + CONFIDENCE) / 2, POWER)) * self.error)


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


def paired(
    values: Mapping[int, float], baseline: Mapping[int, float], models: Mapping[int, str] | None = None
) -> Difference:
    """What `values` have more than `baseline` on the seeds that both have.

    Seeds share their checkpoint, their batches and the examples that measure, so that differences vary less than
    scores.

    Args:
        values: by seed.
        baseline: by seed.
        models: the pre-trained model of each seed. From `FEWEST_MODELS` on, these are the sample, and a model's value
            is the mean over its seeds: seeds of one model tell nothing of another. Fewer make no sample, and seeds
            stand for themselves.

    Raises:
        ValueError: no seed in common.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        raise ValueError("paired: no seed in common")
    groups: dict[str, list[float]] = {}
    for seed in seeds:
        groups.setdefault(models[seed] if models else "", []).append(values[seed] - baseline[seed])
    sample = [x for own in groups.values() for x in own]
    if len(groups) >= FEWEST_MODELS:
        sample = [float(np.mean(own)) for own in groups.values()]
    found = estimate(sample)
    # Rounding leaves differences that are alike a little apart.
    alike = max(sample) - min(sample) < 1e-9
    error = math.nan if len(sample) == 1 else 0.0 if alike else float(stats.sem(sample))
    return Difference(found.mean, found.half, len(seeds), error, len(sample) - 1, len(groups))


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ with the 95 % interval of Bonett and Wright (2000); all NaN where nothing varies.

    Attributes:
        rho: ρ.
        low: where the interval begins.
        high: where it ends.
        error: the standard error of atanh ρ.
    """

    rho: float
    low: float
    high: float
    error: float = math.nan

    def p_against(self, boundary: float) -> float:
        """Of the two-sided test that ρ is `boundary`, by the normal distribution of atanh ρ."""
        return float(2 * stats.norm.sf(abs(math.atanh(_inside(self.rho)) - math.atanh(boundary)) / self.error))

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
    inside = _inside(rho)
    error = math.sqrt((1 + inside**2 / 2) / (len(pairs) - 3))
    reach = stats.norm.ppf((1 + CONFIDENCE) / 2) * error
    low, high = (math.tanh(math.atanh(inside) + sign * reach) for sign in (-1, 1))
    return Correlation(rho, low, high, error)


def _inside(rho: float) -> float:
    return max(-0.999999, min(0.999999, rho))


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

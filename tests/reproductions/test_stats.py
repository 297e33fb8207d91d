"""Intervals and tests against scipy's own, and against values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from reproductions.shared.stats import Difference, estimate, holm, paired, spearman

SCORES = st.floats(0, 100).map(lambda x: round(x, 2))


@given(st.lists(SCORES, min_size=2, max_size=8))
def test_the_interval_is_scipys(values):
    found = estimate(values)
    assert found.mean == pytest.approx(sum(values) / len(values))
    scale = scipy_stats.sem(values)
    low, high = scipy_stats.t.interval(0.95, len(values) - 1, found.mean, scale) if scale else (found.mean,) * 2
    assert (found.low, found.high) == pytest.approx((low, high))


def test_an_interval_by_hand():
    # Deviation 2, three values: t(0.975, 2) = 4.3027.
    found = estimate([8.0, 10.0, 12.0])
    assert found.half == pytest.approx(4.3027 * 2 / 3**0.5, rel=1e-4)
    assert f"{found}" == "10.0 ± 5.0"
    assert f"{found:+.2f}" == "+10.00 ± 4.97"
    assert f"{estimate([3.0])}" == "3.0"
    assert math.isnan(estimate([3.0]).half)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


@given(st.dictionaries(st.integers(0, 9), st.tuples(SCORES, SCORES), min_size=3))
def test_paired_differences_are_scipys(pairs):
    ours, theirs = ({seed: pair[i] for seed, pair in pairs.items()} for i in (0, 1))
    differences = {round(a - b, 2) for a, b in pairs.values()}
    found = paired({**ours, 77: 1.0}, {**theirs, 88: 2.0})
    assert found.n == len(pairs), "seeds that one side lacks are left out"
    assert found.mean == pytest.approx(sum(a - b for a, b in pairs.values()) / len(pairs), abs=1e-9)
    if len(differences) > 1:
        expected = scipy_stats.ttest_rel([ours[s] for s in sorted(ours)], [theirs[s] for s in sorted(ours)])
        assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)


def test_differences_that_do_not_vary():
    assert paired({0: 1.0, 1: 5.0}, {0: 1.0, 1: 5.0}).p == 1
    assert paired({0: 2.0, 1: 6.0}, {0: 1.0, 1: 5.0}).p == 0
    assert math.isnan(paired({0: 2.0}, {0: 1.0}).p)
    with pytest.raises(ValueError, match="no seed"):
        paired({0: 1.0}, {1: 1.0})


def test_three_models_are_the_sample_and_two_are_none():
    values = {seed: x for seed, x in enumerate([1.0, 3.0, 4.0, 6.0, 8.0, 8.0])}
    baseline = dict.fromkeys(range(6), 0.0)
    models = {0: "a", 1: "a", 2: "b", 3: "b", 4: "c", 5: "c"}
    found = paired(values, baseline, models)
    # Means 2, 5 and 8 of the models: deviation 3, t(0.975, 2) = 4.3027, and t = 5 / √3 with p = 1 − t / √(2 + t²).
    assert (found.mean, found.n, found.models, found.freedom) == (5, 6, 3, 2)
    assert found.half == pytest.approx(4.3027 * 3 / 3**0.5, rel=1e-4)
    t = 5 / 3**0.5
    assert found.p == pytest.approx(1 - t / (2 + t**2) ** 0.5)
    assert found.p_against(5.0) == pytest.approx(1)
    assert found.p_against(2.0) == pytest.approx(1 - 3**0.5 / 5**0.5)
    seeds = paired(values, baseline, models | {4: "a", 5: "b"})
    assert (seeds.models, seeds.freedom, seeds.n) == (2, 5, 6)
    assert seeds.half == estimate(list(values.values())).half
    uneven = paired({0: 1.0, 1: 3.0, 2: 8.0, 4: 2.0}, baseline, models)
    assert uneven.mean == pytest.approx((2 + 8 + 2) / 3), "a model counts once, however many seeds it has"


def test_what_a_test_would_find_by_hand():
    # t(0.975, 4) = 2.7764 and t(0.8, 4) = 0.9410, times the standard error.
    assert Difference(1.0, 1.0, 5, 0.5, 4).detectable == pytest.approx(0.5 * (2.7764 + 0.9410), rel=1e-4)
    assert math.isnan(paired({0: 2.0}, {0: 1.0}).detectable)


def test_holm_by_hand():
    # 0.01 · 4, 0.02 · 3, 0.03 · 2 held up by the one before, 0.04 · 1 likewise.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    adjusted = holm([math.nan, 0.02])
    assert math.isnan(adjusted[0])
    assert adjusted[1] == pytest.approx(0.02)


def test_the_rank_correlation_has_the_interval_of_bonett_and_wright():
    pairs = [(1.0, 10.0), (2.0, 30.0), (3.0, 20.0), (4.0, 40.0), (5.0, 50.0)]
    found = spearman(pairs)
    # 1 − 6 Σd² / (n (n² − 1)), and atanh(ρ) ± 1.96 √((1 + ρ²/2) / (n − 3)).
    assert found.rho == pytest.approx(1 - 6 * 2 / (5 * 24))
    reach = 1.959964 * math.sqrt((1 + 0.9**2 / 2) / 2)
    assert found.low == pytest.approx(math.tanh(math.atanh(0.9) - reach), abs=1e-5)
    assert found.high == pytest.approx(math.tanh(math.atanh(0.9) + reach), abs=1e-5)
    # (atanh 0.9 − atanh 0.5) over that error, on both sides of the normal distribution.
    z = (math.atanh(0.9) - math.atanh(0.5)) / (reach / 1.959964)
    assert found.p_against(0.5) == pytest.approx(math.erfc(z / 2**0.5), rel=1e-4)
    assert math.isnan(spearman([(x, 1.0) for x, _ in pairs]).low)
    with pytest.raises(ValueError, match="four pairs"):
        spearman(pairs[:3])

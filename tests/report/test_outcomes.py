"""What became of answers, and the numbers that are made of them."""

import math

import pytest
import torch

from torch_mdgd.report import Probe
from torch_mdgd.report.comparison import Change, Compared, compare, kl, outcomes
from torch_mdgd.report.measure import Measured
from torch_mdgd.report.page import page
from torch_mdgd.report.report import Comparison

P, Q = [0.5, 0.5, 0.0], [0.25, 0.5, 0.25]


def measured(says, chooses, p=P, scale=1.0):
    """Of probes whose right answer is "red"."""
    z = torch.eye(2)[None] * scale
    exact = [x == "red" for x in says]
    return Measured(list(says), list(chooses), exact, [1.0] * len(says), torch.tensor([p]).log(), z)


def probes(choices, picture=None):
    return [Probe(picture, "Which colour?", "red", choices, "colour") for _ in range(5)]


def test_knowledge_and_form_are_told_apart():
    before = measured(["red", "red", "blue", "red", "blue"], ["red"] * 3 + ["red", "blue"])
    after = measured(["blue", "it is red", "red", "red", "blue"], ["blue", "red", "red", "red", "red"])
    found = compare("probes", probes(("red", "blue")), before, after, [0])
    assert [x.outcome for x in found.answers] == ["knowledge lost", "form lost", "gained", "unchanged", "gained"]
    assert outcomes(found)["gained"] == 2
    assert (found.total.restricted.before, found.total.restricted.after) == (80, 80)
    assert (found.total.exact.before, found.total.exact.after) == pytest.approx((60, 40))
    assert found.total.chance == 50


def test_without_choices_answers_are_lost():
    before = measured(["red", "blue", "red", "red", "red"], [None] * 5)
    after = measured(["blue", "red", "red", "red", "red"], [None] * 5)
    found = compare("probes", probes(()), before, after, [0])
    assert [x.outcome for x in found.answers][:3] == ["answer lost", "gained", "unchanged"]
    assert found.total.restricted is None
    assert found.total.chance is None


def test_kl_is_of_before_from_after():
    before, after = measured(["red"], ["red"]), measured(["red"], ["red"], Q)
    assert kl(before, after) == pytest.approx(0.5 * math.log(2), rel=1e-6)
    assert kl(after, before) == math.inf
    assert kl(before, measured(["red"], ["red"], [0.5, 0.5])) is None


def test_an_interval_is_that_of_paired_differences():
    """Differences −1, 0, 0, 1: their standard deviation is √(2/3)."""
    change = Change.of([True, True, False, False], [False, True, False, True])
    assert change.half == pytest.approx(196 * math.sqrt(2 / 3) / 2)
    assert (change.before, change.after) == (50, 50)
    assert Change.of([True], [False]).half is None


def test_another_network_is_refused():
    before, after = measured(["red"], ["red"]), measured(["red"], ["red"])
    after.z = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) before and \(1, 2, 3\) after: a report is about one network"):
        compare("probes", probes(()), before, after, [0])


def test_features_without_a_rank_are_null():
    before, after = measured(["red"] * 5, [None] * 5, scale=0.0), measured(["red"] * 5, [None] * 5, scale=math.nan)
    found = compare("probes", probes(()), before, after, [0])
    as_json = Compared("a", "b", None, (found,)).as_dict()["sets"][0]["layers"]
    assert as_json == ({"layer": 0, "rank_before": None, "rank_after": None, "drift": None},) or as_json == [
        {"layer": 0, "rank_before": None, "rank_after": None, "drift": None}
    ]


def test_a_page_shows_answers_and_escapes_them():
    from torch_mdgd.report.drawn import picture

    asked = probes(("red", "<b>blue"), picture("white", [("circle", "red", 0.5, 0.5, 0.3)]))
    says = ["<script>alert(1)</script>"] * 5
    found = compare("probes", asked, measured(["red"] * 5, ["red"] * 5), measured(says, ["<b>blue"] * 5), [0])
    text = page(Comparison("a & b", "c", None, (found,), (tuple(asked),)))
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "a &amp; b" in text
    assert text.count("data:image/png;base64,") == 5
    assert "Knowledge lost: 5" in text
    # Nothing is loaded from elsewhere.
    assert "http" not in text
    assert 'src="data:' in text
    assert "@import" not in text

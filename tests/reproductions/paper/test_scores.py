"""The summary columns of both tables follow from their scores, and the published numbers are the published ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reproductions.paper.data import DATASETS
from reproductions.paper.report.published import published
from reproductions.paper.report.scores import H_SCORES, summary
from reproductions.shared.scores import harmonic

ROWS = [row for experiment in published().values() for row in experiment.rows.values()]
percent = st.floats(0, 100)


def test_there_are_26_rows():
    assert {name: list(e.rows) for name, e in published().items()} == {
        "llava-flickr30k": ["zero-shot", "fine-tune", "lora", "model-tailor", "mdgd", "mdgd-no-align", "mdgd-gm"],
        "llava-okvqa": ["zero-shot", "fine-tune", "lora", "model-tailor", "mdgd", "mdgd-no-align", "mdgd-gm"],
        "minicpm-pathvqa": ["zero-shot", "fine-tune", "lora", "mdgd", "mdgd-no-align", "mdgd-gm"],
        "minicpm-textcaps": ["zero-shot", "fine-tune", "lora", "mdgd", "mdgd-no-align", "mdgd-gm"],
    }
    assert len(ROWS) == 26


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.experiment}-{row.method}")
def test_average_and_hscore_are_recomputed(row):
    total = summary(list(row.scores.values()))
    # Both are printed with two digits.
    assert total.average == pytest.approx(row.average, abs=0.01)
    assert total.h(published()[row.experiment].hscore) == pytest.approx(row.hscore, abs=0.01)


@pytest.mark.parametrize("name", H_SCORES)
def test_no_other_hscore_fits_a_table(name):
    for table in (1, 2):
        rows = [row for e in published().values() if e.table == table for row in e.rows.values()]
        fits = [abs(summary(list(row.scores.values())).h(name) - row.hscore) < 0.05 for row in rows]
        assert all(fits) == any(published()[row.experiment].hscore == name for row in rows)


def test_the_order_of_the_paper():
    """Some cells read off the paper again, so that a slipped column shows."""
    mdgd = published()["llava-flickr30k"].rows["mdgd"]
    assert mdgd.scores == {"gqa": 67.71, "vizwiz": 48.18, "scienceqa": 69.05, "textvqa": 57.32, "pope": 85.12,
                           "mmbench": 65.43, "flickr30k": 73.47}  # fmt: skip
    plain = published()["minicpm-pathvqa"].rows["fine-tune"]
    assert plain.scores == {"vizwiz": 52.91, "aokvqa": 76.94, "okvqa": 59.06, "textvqa": 58.34, "iconqa": 76.96,
                            "pope": 89.6, "mmbench": 70.16, "pathvqa": 11.04}  # fmt: skip
    assert (mdgd.params, plain.params) == ("1.2B", "517M")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.experiment}-{row.method}")
def test_printed_and_exact_numbers_of_parameters_agree(row):
    if row.params == "–":
        assert row.trained == 0
    elif row.trained is not None:
        unit = {"M": 1e6, "B": 1e9}[row.params[-1]]
        # 517.8 M is printed as 517 M.
        assert row.trained / unit == pytest.approx(float(row.params[:-1]), abs=1 if unit == 1e6 else 0.05)


def test_tasks_are_data_sets():
    for experiment in published().values():
        assert set(experiment.tasks) <= set(DATASETS)
        assert DATASETS[experiment.target].training
        assert experiment.tasks[-1] == experiment.target
        for row in experiment.rows.values():
            assert tuple(row.scores) == experiment.tasks


@given(percent, percent)
def test_harmonic_mean(one, other):
    mean = harmonic(one, other)
    assert min(one, other) - 1e-9 <= mean <= (one + other) / 2 + 1e-9
    if min(one, other) > 1e-3:
        assert 2 / mean == pytest.approx(1 / one + 1 / other)


def test_a_zero_in_the_harmonic_mean():
    assert harmonic(0, 0) == 0
    assert harmonic(0, 80) == 0


def test_the_three_hscores():
    total = summary([60.0, 20.0, 10.0])
    assert (total.retained, total.average, total.target) == (40, 30, 10)
    assert total.h("H(P, Avg)") == pytest.approx(2 * 40 * 30 / 70)
    assert total.h("H(Avg, T)") == pytest.approx(15)
    assert total.h("H(P, T)") == pytest.approx(16)
    with pytest.raises(ValueError, match="H\\(P, T\\)"):
        total.h("H")
    with pytest.raises(ValueError, match="a target"):
        summary([50.0])

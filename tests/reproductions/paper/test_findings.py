"""Findings are judged by the numbers: the published ones agree with the paper, and others need not."""

import json

import pytest

from reproductions.paper.report.findings import findings
from reproductions.paper.report.published import published
from reproductions.paper.report.results import read_results
from tests.reproductions.paper.made_up_results import write_results

FLICKR = "llava-flickr30k"


def judged(folder):
    return findings(read_results(folder))


def change(folder, method, task, **values):
    path = folder / FLICKR / method / "evaluation" / f"{task}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("results"))


def test_made_up_results_are_judged(everything):
    # Their scores are near the published ones; their ranks fall with the drift, MDGD's below the pre-trained ones.
    lower, above, at_or_above, best, order, aligned = judged(everything)
    assert [f.holds for f in (lower, above, at_or_above, best, order, aligned)] == [True, True, False, True, True, True]
    assert [len(f.evidence) for f in (lower, above, at_or_above, best, order, aligned)] == [4, 4, 2, 4, 2, 4]
    assert lower.evidence[0] == "llava-flickr30k: on 6 of 6 tasks, by +8.2 on average"
    assert at_or_above.evidence[0] == "llava-flickr30k: on 0 of 6 tasks, by -3.0 on average"
    assert aligned.evidence[0] == "llava-flickr30k: 0.75"


def test_nothing_measured_is_nothing_found(tmp_path):
    assert {(f.holds, f.evidence) for f in judged(tmp_path)} == {(None, ())}


def test_smoke_runs_are_no_evidence(tmp_path):
    assert {f.holds for f in judged(write_results(tmp_path, smoke=True))} == {None}


def test_one_task_decides(tmp_path):
    write_results(tmp_path, [FLICKR])
    change(tmp_path, "mdgd", "pope", effective_rank=1.0)
    _, above, *_ = judged(tmp_path)
    assert above.holds is False
    assert "on 5 of 6 tasks" in above.evidence[0]


def test_another_winner_and_another_order(tmp_path):
    write_results(tmp_path, [FLICKR])
    for task in published()[FLICKR].tasks:
        change(tmp_path, "lora", task, scores={"score": 99.0})
    *_, best, order, _ = judged(tmp_path)
    assert best.holds is order.holds is False
    assert best.evidence[0].startswith("llava-flickr30k: lora 99.00, mdgd 67.36")


def test_incomplete_runs_do_not_compare(tmp_path):
    write_results(tmp_path, [FLICKR])
    (tmp_path / FLICKR / "lora" / "evaluation" / "gqa.json").unlink()
    *_, best, order, _ = judged(tmp_path)
    assert order.holds is None
    assert best.holds is True
    assert "lora" not in best.evidence[0]


@pytest.mark.parametrize("methods", [["mdgd"], ["zero-shot", "fine-tune"], ["mdgd", "fine-tune"]])
def test_the_best_needs_somebody_to_beat(methods, tmp_path):
    assert judged(write_results(tmp_path, [FLICKR], methods))[3].holds is None

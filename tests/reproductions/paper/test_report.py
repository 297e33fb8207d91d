"""The report is one page that needs nothing else, shows everything and says what is smoke."""

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from reproductions.paper.data import DATASETS
from reproductions.paper.report import figures
from reproductions.paper.report import page as report
from reproductions.paper.report.analysis import Embedding
from reproductions.paper.report.page import write_report
from reproductions.paper.report.published import published
from tests.reproductions.paper.made_up_results import write_results, write_run

FLICKR = "llava-flickr30k"
VOID = {"meta", "img", "br", "link"}


class Balanced(HTMLParser):
    """Checks that tags are closed in order, and keeps the text and the pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.text, self.pictures, self.links = [], "", [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[key] for key in ("src", "href") if key in values]
        if tag == "img":
            self.pictures.append(values["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if self.open and self.open[-1] == "style" else data + " "


def read(path) -> Balanced:
    page = Balanced()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Balanced:
    folder = write_results(tmp_path_factory.mktemp("results"), smoke=True)
    with pytest.MonkeyPatch.context() as patch:
        # t-SNE takes most of the time, and is tested where the figures are.
        patch.setattr(figures, "embed", lambda *_: Embedding({"mdgd": np.random.default_rng(0).normal(size=(9, 2))}))
        return read(write_report(folder, tmp_path_factory.mktemp("report")))


@pytest.fixture
def no_figures(monkeypatch):
    """Where a test is about something else: drawing takes seconds."""
    monkeypatch.setattr(report, "draw_all", lambda results, output: [])


def test_the_page_needs_nothing_else(page):
    assert all(link.startswith(("#", "data:image/")) for link in page.links)
    assert len(page.pictures) > 5
    for picture in page.pictures:
        kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", picture).groups()
        assert Image.open(BytesIO(base64.b64decode(content))).format == kind.upper()


def test_the_page_shows_every_table_figure_and_run(page):
    for experiment in published().values():
        assert f"{experiment.model} fine-tuned on {DATASETS[experiment.target].title}" in page.text
        for row in experiment.rows.values():
            assert f"{row.hscore:.2f}" in page.text
            assert experiment.name in page.text
    assert all(f"Figure {i}." in page.text for i in range(1, 6))
    assert page.text.count('"versions"') == 26


def test_smoke_is_marked(page, tmp_path, no_figures):
    assert "SMOKE. All runs here are smoke runs" in page.text
    assert "0 of the 26 published rows measured; 26 smoke runs." in page.text
    real = read(write_report(write_results(tmp_path, [FLICKR], ["mdgd"]), tmp_path))
    assert "SMOKE" not in real.text
    assert "1 of the 26 published rows measured. 1.4 hours on a made-up GPU." in real.text


def test_some_smoke_among_real_runs(tmp_path, no_figures):
    experiment = published()[FLICKR]
    write_run(tmp_path, experiment, experiment.rows["mdgd"])
    write_run(tmp_path, experiment, experiment.rows["lora"], smoke=True)
    text = read(write_report(tmp_path, tmp_path)).text
    assert "1 of 2 runs here are smoke runs" in text
    assert "1 of the 26 published rows measured; 1 smoke runs" in text


def test_answers_stand_beside_their_picture(tmp_path, no_figures):
    page = read(write_report(write_results(tmp_path, [FLICKR], ["zero-shot", "mdgd"]), tmp_path))
    # Text from data sets and models is text, whatever is in it.
    assert "Which colour & shape, " in page.text
    assert "<no idea>" in page.text
    tasks = len(published()[FLICKR].tasks)
    assert len([p for p in page.pictures if "jpeg" in p]) == tasks * report.SHOWN


def test_runs_and_tasks_stand_in_the_order_of_the_tables(tmp_path, no_figures):
    folder = write_results(tmp_path, [FLICKR])
    (folder / FLICKR / "mdgd").rename(folder / FLICKR / "corda")
    text = read(write_report(folder, tmp_path)).text
    answers, runs = text[text.index(" Answers \n") :].split(" Runs \n")
    titles = [DATASETS[task].title for task in published()[FLICKR].tasks]
    assert re.findall(r" ({}) ".format("|".join(titles)), answers) == titles
    labels = [row.label for method, row in published()[FLICKR].rows.items() if method != "mdgd"]
    assert re.findall(rf"{FLICKR}  (.+?)  a made-up GPU, 1.4 hours", runs) == [*labels, "MDGD"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 seconds"), (59, "59.0 seconds"), (90, "1.5 minutes"), (5025, "1.4 hours")]
)
def test_times_are_in_the_unit_that_suits_them(seconds, text):
    assert report._taken(seconds) == text


def test_the_most_telling_examples_come_first(tmp_path, no_figures):
    folder = write_results(tmp_path, [FLICKR], ["zero-shot", "mdgd"])
    for method, right in (("zero-shot", (1, 5)), ("mdgd", (5,))):
        line = {"answers": ["a"], "prediction": "p"}
        lines = [line | {"id": str(i), "question": f"q{i}", "score": 100.0 * (i in right)} for i in range(12)]
        path = folder / FLICKR / method / "evaluation" / "gqa.predictions.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = read(write_report(folder, tmp_path)).text
    asked = re.findall(r"\bq(\d+)\b", text)
    assert asked == ["1", "0", "2", "3"]


def test_a_page_without_pictures_predictions_or_figures(tmp_path):
    folder = write_results(tmp_path, [FLICKR], ["mdgd"])
    for path in (folder / FLICKR / "mdgd").rglob("*"):
        if path.suffix in (".jpg", ".jsonl", ".safetensors"):
            path.unlink()
    page = read(write_report(folder, tmp_path / "page.html"))
    assert page.pictures == []
    assert "No run has left data for a figure yet." in page.text


def test_an_empty_folder_is_a_page_of_published_values(tmp_path):
    path = write_report(tmp_path, tmp_path / "somewhere" / "new")
    assert path == tmp_path / "somewhere" / "new" / "report.html"
    text = read(path).text
    assert "0 of the 26 published rows measured" in text
    assert text.count("not run") == 26


def test_findings_are_on_the_page(tmp_path, no_figures):
    text = read(write_report(write_results(tmp_path, [FLICKR]), tmp_path)).text
    assert "✓ MDGD or MDGD-GM has the best Avg." in text
    assert "✗ On LLaVA, MDGD's effective rank is at or above the pre-trained one. " in text
    assert "llava-flickr30k: on 0 of 6 tasks, by -3.0 on average" in text


def test_smoke_runs_are_no_evidence(page):
    assert page.text.count("not measured yet") == 6

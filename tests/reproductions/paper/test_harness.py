"""lmms-eval around a tiny model, on a task of its own schema in local files."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval.evaluator")

from reproductions.paper.data import DATASETS, DataError
from reproductions.paper.models import load_model
from reproductions.paper.run.harness import Harnessed, cut, load_run, measure

CPU = torch.device("cpu")
TASK = """
task: tiny_textvqa
dataset_path: parquet
dataset_kwargs:
  data_files:
    validation: {files}
test_split: validation
output_type: generate_until
doc_to_visual: !function own.pictures
doc_to_text: !function own.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 3
process_results: !function own.score
metric_list:
  - metric: length
    aggregation: !function own.mean
    higher_is_better: true
"""
FUNCTIONS = """
from io import BytesIO

from PIL import Image


def pictures(doc):
    return [Image.open(BytesIO(doc["image"]["bytes"]))]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"length": len(results[0])}


def mean(items):
    return sum(items) / len(items)
"""


@pytest.fixture
def model(assets):
    return load_model("llava-1.5-7b", assets.model("llava-1.5-7b"), "float32", CPU)


def test_a_task_of_ones_own_from_end_to_end(assets, model, tmp_path):
    (tmp_path / "own.py").write_text(FUNCTIONS)
    (tmp_path / "tiny_textvqa.yaml").write_text(TASK.format(files=assets.data / "textvqa" / "data" / "*.parquet"))
    found = measure(model, ["tiny_textvqa"], tasks_folder=tmp_path, limit=3)
    examples = DATASETS["textvqa"].load("validation", source=assets.data / "textvqa")[:3]
    asked = [SimpleNamespace(image=x.image, question=x.question.split("\n")[0], target="") for x in examples]
    expected = [model.generate(model.collate([x], answers=False), 3)[0] for x in asked]
    assert found["tiny_textvqa"]["length,none"] == pytest.approx(sum(map(len, expected)) / 3)


def request(text, settings, number=0):
    return SimpleNamespace(args=(text, settings, lambda doc: [doc], number, "task", "test"))


def test_data_that_lmms_eval_cannot_load_are_told_in_a_line(model, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(FUNCTIONS)
    (tmp_path / "tiny_textvqa.yaml").write_text(TASK.format(files=tmp_path / "nothing" / "*.parquet"))
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    with pytest.raises(DataError, match="lmms-eval: At least one valid data file must be specified"):
        measure(model, ["tiny_textvqa"], tasks_folder=tmp_path)


def test_answers_are_the_models_own_in_order(model):
    pictures = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    harnessed = Harnessed(model, batch_size=2)
    harnessed.task_dict = {"task": {"test": pictures}}
    texts = ["What?", "Which colour is this?", "Why?"]
    asked = [SimpleNamespace(image=p, question=t, target="") for p, t in zip(pictures, texts, strict=True)]
    expected = [model.generate(model.collate([x], answers=False), 4)[0] for x in asked]
    got = harnessed.generate_until([request(t, {"max_new_tokens": 4}, i) for i, t in enumerate(texts)])
    assert got == [x.strip() for x in expected]


def test_answers_end_where_the_task_says():
    assert cut("a cat\n\nand a dog", ["\n\n", "."]) == "a cat"
    assert cut("a cat. And", "a cat") == ""
    assert cut(" a cat ", None) == "a cat"


def test_requests_about_several_pictures_are_refused(model):
    harnessed = Harnessed(model)
    harnessed.task_dict = {"task": {"test": [None]}}
    two = SimpleNamespace(args=("x", {}, lambda doc: [1, 2], 0, "task", "test"))
    with pytest.raises(ValueError, match="task: example 0 has 2 pictures"):
        harnessed.generate_until([two])


def test_a_runs_model_is_that_which_was_measured(assets, tmp_path):
    from rich.console import Console

    from reproductions.paper.run.row import run_row
    from reproductions.paper.run.weights import NAME, load_file

    experiment = assets.experiment("llava-okvqa", ['pretrained=["pope"]', "training.steps=1"])
    folder = run_row(experiment, "fine-tune", tmp_path, smoke=True, device=CPU, console=Console(quiet=True))
    parameters = dict(load_run(folder, CPU).network.named_parameters())
    for name, value in load_file(folder / NAME).items():
        assert torch.equal(parameters[name], value)

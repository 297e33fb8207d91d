"""Rows that are killed and taken up again end as if they had not been."""

import json
import multiprocessing
import os
import signal
import warnings
from collections import Counter

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from reproductions.methods.base import train_last
from reproductions.paper.models.base import VisionLanguageModel
from reproductions.paper.run import masking, train
from reproductions.paper.run.weights import NAME
from reproductions.paper.run.work import Workshop
from reproductions.shared.files import BusyError, FileError
from tests.reproductions.paper.running import CPU, EXACT, contents, row


class Killed(BaseException):
    """As a kill is: nothing that catches errors sees it."""


class KillAt(TrainerCallback):
    def __init__(self, step, how):
        self.step, self.how = step, how

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.how()


def die():
    raise Killed


@pytest.fixture(scope="module")
def whole(assets, tmp_path_factory):
    """An uninterrupted row of MDGD."""
    return row(assets, tmp_path_factory.mktemp("whole"), "mdgd")


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("method", ["fine-tune", "inputs", "lora", "ewc", "corda", "osf"])
def test_a_run_killed_while_training_ends_as_if_it_was_not(method, assets, tmp_path):
    """MDGD too, with its evaluation, where processes are killed and checkpoints cut short."""
    expected = contents(row(assets, tmp_path / "whole", method))
    with pytest.raises(Killed):
        row(assets, tmp_path / "killed", method, callbacks=[KillAt(2, die)])
    folder = tmp_path / "killed" / "llava-okvqa" / method
    assert json.loads((folder / "status.json").read_text())["stage"] == "training"
    # The log has lines of steps that are taken again, and of none that come later.
    with (folder / "training.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.0}\n{"st')
    row(assets, tmp_path / "killed", method)
    assert contents(folder) == expected


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("method", ["fine-tune", "mdgd"])
def test_a_run_killed_after_its_last_step_takes_no_other(method, assets, tmp_path):
    """With a rate that is not 0 at the end, at which one step more changes nothing."""
    expected = contents(row(assets, tmp_path / "whole", method, "training.schedule=constant"))
    with pytest.raises(Killed):
        row(assets, tmp_path / "killed", method, "training.schedule=constant", callbacks=[KillAt(3, die)])
    assert (tmp_path / "killed" / "llava-okvqa" / method / "checkpoints" / "checkpoint-3").is_dir()
    assert contents(row(assets, tmp_path / "killed", method, "training.schedule=constant")) == expected


@pytest.mark.usefixtures("unmeasured")
def test_minicpm_killed_while_training_ends_as_if_it_was_not(assets, tmp_path):
    expected = contents(row(assets, tmp_path / "whole", "mdgd-gm", name="minicpm-pathvqa"))
    with pytest.raises(Killed):
        row(assets, tmp_path / "killed", "mdgd-gm", name="minicpm-pathvqa", callbacks=[KillAt(1, die)])
    assert contents(row(assets, tmp_path / "killed", "mdgd-gm", name="minicpm-pathvqa")) == expected


def test_a_process_that_is_really_killed(assets, whole, tmp_path):
    callback = KillAt(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
    process = multiprocessing.get_context("fork").Process(
        target=row, args=(assets, tmp_path, "mdgd"), kwargs={"callbacks": [callback]}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = tmp_path / "llava-okvqa" / "mdgd"
    assert not (folder / NAME).exists()
    assert list((folder / "checkpoints").iterdir())
    row(assets, tmp_path, "mdgd")
    assert contents(folder) == contents(whole)


def test_two_processes_do_not_do_the_same_row(assets, tmp_path):
    """As after a kill of the process that gave the rows out: those that do them live on."""
    context = multiprocessing.get_context("fork")
    begun, go = context.Event(), context.Event()

    def wait():
        begun.set()
        go.wait()

    process = context.Process(target=row, args=(assets, tmp_path, "fine-tune"), kwargs={"callbacks": [KillAt(1, wait)]})
    process.start()
    begun.wait()
    for method in ("fine-tune", "model-tailor"):
        with pytest.raises(BusyError, match="llava-okvqa/fine-tune: another process is at work here"):
            row(assets, tmp_path, method)
    go.set()
    process.join()
    assert process.exitcode == 0
    assert json.loads((tmp_path / "llava-okvqa" / "fine-tune" / "status.json").read_text())["stage"] == "done"


def test_a_checkpoint_cut_short_is_passed_over(assets, whole, tmp_path):
    with pytest.raises(Killed):
        row(assets, tmp_path, "mdgd", callbacks=[KillAt(2, die)])
    checkpoints = tmp_path / "llava-okvqa" / "mdgd" / "checkpoints"
    last = checkpoints / "checkpoint-2"
    cut = checkpoints / "checkpoint-3"
    cut.mkdir()
    (cut / train.TRAINED).write_bytes((last / train.TRAINED).read_bytes()[:50])
    assert train.last_checkpoint(checkpoints) == str(last)
    assert not cut.exists()
    row(assets, tmp_path, "mdgd")
    assert contents(tmp_path / "llava-okvqa" / "mdgd") == contents(whole)


@pytest.mark.parametrize("file", [train.TRAINED, "optimizer.pt"])
def test_a_broken_checkpoint_is_named(file, assets, tmp_path):
    with pytest.raises(Killed):
        row(assets, tmp_path, "fine-tune", callbacks=[KillAt(1, die)])
    checkpoint = tmp_path / "llava-okvqa" / "fine-tune" / "checkpoints" / "checkpoint-1"
    (checkpoint / file).write_bytes(b"half of ")
    with pytest.raises(FileError, match=r"checkpoint-1 is not a whole checkpoint \(.*\): remove it"):
        row(assets, tmp_path, "fine-tune")


def test_a_checkpoint_holds_what_is_trained_alone(assets, tmp_path):
    with pytest.raises(Killed):
        row(assets, tmp_path, "fine-tune", callbacks=[KillAt(1, die)])
    folder = tmp_path / "llava-okvqa" / "fine-tune" / "checkpoints" / "checkpoint-1"
    work = Workshop(assets.experiment("llava-okvqa", EXACT), CPU)
    parameters = train_last(work.network, 2)
    saved = load_file(folder / train.TRAINED)
    assert sum(x.numel() for x in saved.values()) == sum(p.numel() for p in parameters)
    assert not list(folder.glob("model*"))


def test_an_evaluation_that_was_killed_asks_what_is_left(assets, whole, tmp_path, monkeypatch):
    asked, generate = Counter(), VisionLanguageModel.generate

    def generate_until(limit):
        def answer(self, batch, longest, **search):
            asked["batches"] += 1
            if asked["batches"] > limit:
                raise Killed
            return generate(self, batch, longest, **search)

        return answer

    expected = contents(row(assets, tmp_path / "whole", "mdgd", "evaluation.batch=1"))
    monkeypatch.setattr(VisionLanguageModel, "generate", generate_until(2))
    with pytest.raises(Killed):
        row(assets, tmp_path / "killed", "mdgd", "evaluation.batch=1")
    folder = tmp_path / "killed" / "llava-okvqa" / "mdgd"
    assert json.loads((folder / "status.json").read_text())["stage"] == "evaluation"
    lines = folder / "evaluation" / "textvqa.predictions.jsonl"
    assert len(lines.read_text().splitlines()) == 2
    lines.write_text(lines.read_text()[:-9])
    asked.clear()
    monkeypatch.setattr(VisionLanguageModel, "generate", generate_until(100))
    row(assets, tmp_path / "killed", "mdgd", "evaluation.batch=1")
    assert asked["batches"] == 2 * 3 - 1, "the first answer was there whole"
    assert contents(folder) == expected


def test_answers_to_other_examples_are_refused(assets, tmp_path):
    folder = tmp_path / "llava-okvqa" / "zero-shot" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "textvqa.predictions.jsonl").write_text('{"id": "another", "prediction": "x"}\n')
    with pytest.raises(ValueError, match=r"textvqa.predictions.jsonl holds answers to other examples \(another, not"):
        row(assets, tmp_path, "zero-shot")


@pytest.mark.usefixtures("unmeasured")
def test_an_analysis_that_was_killed_keeps_the_ratios_that_are_there(assets, tmp_path, monkeypatch):
    ratios = "masking.ratios=[0.3, 0.9]"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* the reference is not what training begins with")
        expected = contents(row(assets, tmp_path / "whole", "mdgd-gm", ratios))
    measure, done = masking.measure, []

    def measure_once(work, trained):
        if done:
            raise Killed
        done.append(trained)
        return measure(work, trained)

    monkeypatch.setattr(masking, "measure", measure_once)
    with pytest.raises(Killed):
        row(assets, tmp_path / "killed", "mdgd-gm", ratios)
    folder = tmp_path / "killed" / "llava-okvqa" / "mdgd-gm"
    assert [entry["ratio"] for entry in json.loads((folder / "analysis" / "masking.json").read_text())] == [0.3]
    # As of a kill after the ratio was written down and before its checkpoints were gone.
    (folder / "analysis" / "ratio-0.3" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(masking, "measure", lambda work, trained: done.append(trained) or measure(work, trained))
    row(assets, tmp_path / "killed", "mdgd-gm", ratios)
    assert len(done) == 2
    assert not list((folder / "analysis").glob("ratio-*"))
    assert contents(folder) == expected

"""Several rows: after each other, beside each other on GPUs, and when some of them fail."""

import json
import multiprocessing
import os
import re
import shutil
import sys
import weakref
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from reproductions.__main__ import app
from reproductions.methods import METHODS
from reproductions.paper import models
from reproductions.paper.config import experiment_names, load_experiment, method_of, methods_of
from reproductions.paper.data import DataError
from reproductions.paper.data.dataset import DataSet
from reproductions.paper.run import row, rows, work
from reproductions.shared.fields import ConfigError
from reproductions.shared.files import alone_in
from tests.reproductions.paper.sample_files import edit

QUIET = Console(quiet=True)


def call(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


@pytest.fixture(autouse=True)
def boundless(monkeypatch):
    """A hub that has all weights, and a disk with room for them."""
    monkeypatch.setattr(rows, "fetch_weights", lambda model, source: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e15))


@pytest.fixture
def everything(assets):
    """What makes rows find all data without a hub."""
    return "--data", assets.data


def test_a_row_that_fails_does_not_stop_the_others(everything, tmp_path, monkeypatch):
    def fails(experiment, name, *args, **kwargs):
        asked.append(name)
        if name == "lora":
            raise RuntimeError("it broke")

    asked = []
    monkeypatch.setattr(row, "run_row", fails)
    done = call("run", "minicpm-pathvqa", "--all", "--results", tmp_path, *everything)
    assert done.exit_code == 1
    assert asked == ["zero-shot", "fine-tune", "lora", "mdgd", "mdgd-no-align", "mdgd-gm"]
    assert "1 rows failed" in done.output
    assert "minicpm-pathvqa lora" in done.output
    assert "Table 2: MiniCPM-V-2.0 fine-tuned on PathVQA" in done.output, "what there is so far"


def test_what_a_failed_row_held_is_gone_before_the_next(everything, tmp_path, monkeypatch):
    class Held:
        """As a Trainer: in a cycle, which only the collector takes apart."""

        def __init__(self):
            self.itself = self

    def fails(experiment, name, *args, **kwargs):
        alive.append([x() is not None for x in held])
        mine = Held()
        held.append(weakref.ref(mine))
        raise torch.OutOfMemoryError("CUDA out of memory")

    held, alive = [], []
    monkeypatch.setattr(row, "run_row", fails)
    done = call("run", "minicpm-pathvqa", "--all", "--results", tmp_path, *everything)
    assert alive[2] == [False, False]
    assert "minicpm-pathvqa mdgd: out of GPU memory" in done.output
    assert "halve training.batch and double training.accumulation" in " ".join(done.output.split())


def test_rows_are_dealt_out_one_by_one_and_a_tailored_one_waits_for_its_fine_tune():
    found = {name: methods_of(load_experiment(name).model) for name in experiment_names()}
    waiting, running, order = rows.row_list(found), [], []
    assert len(waiting) == 26
    while waiting or running:
        # Two GPUs, of which the one that began last is free first.
        while len(running) < 2 and (row := rows.take(waiting, running)):
            running.append(row)
            order.append(row)
        running.pop()
    assert sorted(order) == sorted(rows.row_list(found))
    assert rows.take([("x", "model-tailor"), ("x", "lora")], [("x", "fine-tune")]) == ("x", "lora")
    assert rows.take([("x", "model-tailor")], [("x", "fine-tune")]) is None
    assert rows.take([("x", "model-tailor")], [("y", "fine-tune")]) == ("x", "model-tailor")


def test_a_row_in_a_process_of_its_own_is_the_row_that_was_asked_for(tmp_path):
    command = rows.command(("llava-okvqa", "fine-tune"), ["seed=1", 'data.source="x y"'], tmp_path)
    assert command[3:] == [
        "run", "llava-okvqa", "--method", "fine-tune", "--results", str(tmp_path), "--set", "seed=1", "--set",
        'data.source="x y"',
    ]  # fmt: skip


def test_every_gpu_takes_the_next_row_when_it_is_free(tmp_path, monkeypatch):
    def command(row, overrides, results):
        code = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[1]); sys.exit(sys.argv[1] == 'lora')"
        return [sys.executable, "-c", code, row[1]]

    monkeypatch.setattr(rows, "command", command)
    asked = {"x": ["zero-shot", "lora"], "y": ["mdgd"]}
    with pytest.raises(rows.RowsFailedError, match=r"1 rows failed.*\nx lora: see .*gpu-\d.log"):
        rows.beside(asked, [], tmp_path, ["0", "1"], QUIET)
    lines = [line.split() for n in "01" for line in (tmp_path / f"gpu-{n}.log").read_text().splitlines()]
    assert sorted(method for _, method in lines) == ["lora", "mdgd", "zero-shot"]
    assert {device for device, _ in lines} == {"0", "1"}


CHILD = """
import signal, sys
with open(sys.argv[1], "w") as fifo:
    print("begun", file=fifo, flush=True)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(30)
    signal.pause()
    print("survived", file=fifo, flush=True)
"""


def give_out(folder):
    """In a process of its own, where the change of `rows` stays."""
    rows.command = lambda row, overrides, results: [sys.executable, "-c", CHILD, str(results / "fifo")]
    rows.beside({"x": ["mdgd"]}, [], folder, ["0"], QUIET)


@pytest.mark.skipif(sys.platform != "linux", reason="what other systems lack")
def test_rows_die_with_the_process_that_gave_them_out(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    parent = multiprocessing.get_context("fork").Process(target=give_out, args=(tmp_path,))
    parent.start()
    with (tmp_path / "fifo").open() as fifo:
        assert fifo.readline() == "begun\n"
        parent.kill()
        parent.join()
        assert fifo.read() == ""


def test_rows_go_to_the_gpus_where_there_are_several(everything, tmp_path, monkeypatch):
    def beside(found, overrides, results, devices, console):
        asked.append((list(found), list(devices)))

    asked = []
    monkeypatch.setattr(rows, "beside", beside)
    monkeypatch.setattr(rows, "visible_devices", lambda: ["0", "1"])
    done = call("run", "--all", "--results", tmp_path, *everything)
    assert done.exit_code == 0, done.output
    assert asked == [(experiment_names(), ["0", "1"])]


def test_devices_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert rows.visible_devices() == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert rows.visible_devices() == ["0", "1"]


def test_rows_beyond_the_paper_on_request():
    found = rows.chosen("llava-okvqa", None, True, True, False, [])
    assert list(found["llava-okvqa"]) == list(METHODS)
    assert "ewc" not in rows.chosen("llava-okvqa", None, True, False, True, [])["llava-okvqa"]
    with pytest.raises(ConfigError):
        rows.chosen(None, "mdgd", False, False, False, [])


def test_data_that_cannot_be_had_are_missed_before_anything_runs(assets, tmp_path, monkeypatch):
    def fetch(self, split, organisation, revision):
        if self.name == "pope":
            raise DataError("POPE: the hub is out of reach")
        return assets.data / self.name

    asked = []
    monkeypatch.setattr(DataSet, "fetch", fetch)
    monkeypatch.setattr(row, "run_row", lambda experiment, name, *args, **kwargs: asked.append(name))
    done = call("run", "llava-okvqa", "--all", "--results", tmp_path)
    assert "GQA, testdev: 16 examples" in done.output
    assert "POPE: the hub is out of reach" in done.output
    assert len(asked) == 7, "the others may do"
    alone = call("run", "llava-okvqa", "--method", "zero-shot", "--results", tmp_path)
    assert alone.exit_code == 2
    assert alone.output.splitlines()[-1] == "POPE: the hub is out of reach"
    assert "OK-VQA, train:" not in alone.output, "which zero-shot does not need"
    assert len(asked) == 7


def test_weights_that_cannot_be_had_are_missed_before_anything_runs(everything, tmp_path, monkeypatch):
    """Those of the last rows too, which come after a day."""

    def download(repository, *, allow_patterns):
        asked.append(repository)
        assert {"*.safetensors", "*.json"} < set(allow_patterns)
        if repository == "openbmb/MiniCPM-V-2":
            raise OSError("Access to model openbmb/MiniCPM-V-2 is restricted. Please log in.")

    asked, done = [], []
    monkeypatch.setattr(rows, "fetch_weights", models.fetch_weights)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(row, "run_row", lambda experiment, name, *args, **kwargs: done.append(asked.copy()))
    method = ("run", "--all", "--method", "zero-shot", "--results", tmp_path)
    told = call(*method, *everything).output
    assert "minicpm-v-2: could not read openbmb/MiniCPM-V-2: Access to model" in told
    assert done == [["llava-hf/llava-1.5-7b-hf", "openbmb/MiniCPM-V-2"]] * 4, "each once, and before the first row"
    asked.clear()
    alone = call("run", "minicpm-pathvqa", *method[2:], *everything)
    assert alone.exit_code == 2
    assert "set source=FOLDER" in alone.output.splitlines()[-1]
    call("run", "minicpm-pathvqa", *method[2:], *everything, "--set", f"source={tmp_path}")
    assert asked == ["openbmb/MiniCPM-V-2"], "a folder needs no hub"


def test_a_disk_without_room_for_all_rows_is_seen_before_the_first(everything, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100e9))
    monkeypatch.setattr(row, "run_row", lambda *args, **kwargs: pytest.fail("it runs"))
    monkeypatch.setattr(rows, "visible_devices", lambda: ["0", "1"])
    done = call("run", "--all", "--results", tmp_path, *everything)
    assert done.exit_code == 2
    assert re.search(
        r"these rows write about 117\.\d GB, checkpoints of 2 at a time among them, and 100\.0 GB", done.output
    )


def test_a_broken_row_is_missed_before_anything_runs(assets, tmp_path, monkeypatch):
    """Not when the last of thousands of questions is asked."""
    shutil.copytree(assets.data / "pope", tmp_path / "data" / "pope")
    edit(tmp_path / "data" / "pope", lambda found: found[-1].update({"answer": None}))
    monkeypatch.setattr(row, "run_row", lambda *args, **kwargs: pytest.fail("it runs"))
    narrow = ("--set", 'pretrained=["pope"]')
    (tmp_path / "data" / "okvqa").symlink_to(assets.data / "okvqa")
    asked = ("run", "llava-okvqa", "--method", "zero-shot", "--results", tmp_path, "--data", tmp_path / "data")
    done = call(*asked, *narrow)
    assert done.exit_code == 2
    assert done.output.splitlines()[-1] == "POPE, split test, row 15: column 'answer' is missing or empty"


def test_a_folder_of_results_keeps_to_the_commits_that_it_began_with(assets, tmp_path, monkeypatch):
    def fetch(self, split, organisation, revision=None):
        asked.append((self.name, split, revision))
        folder = tmp_path / "hub" / self.name / "snapshots" / (revision or "new")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            folder.symlink_to(assets.data / self.name)
        return folder

    asked, seen = [], []
    work._open.cache_clear()
    monkeypatch.setattr(work, "_COMMITS", {})
    monkeypatch.setattr(DataSet, "fetch", fetch)
    monkeypatch.setattr(row, "run_row", lambda experiment, *args, **kwargs: seen.append(experiment.data.revisions))
    narrow = ("--set", 'pretrained=["pope"]', "--set", "evaluation.examples=3")
    call("run", "llava-okvqa", "--method", "zero-shot", "--results", tmp_path / "results", *narrow)
    pins = json.loads((tmp_path / "results" / "revisions.json").read_text())
    assert pins == {"pope/test": "new", "okvqa/val2014": "new"}
    assert seen == [pins]
    (tmp_path / "results" / "revisions.json").write_text('{"pope/test": "old"}')
    asked.clear()
    call("run", "llava-okvqa", "--method", "zero-shot", "--results", tmp_path / "results", *narrow)
    assert ("pope", "test", "old") in asked
    pinned = load_experiment("llava-okvqa", ["data.revisions.pope/test=old", "data.revisions.pathvqa/test=new"])
    configuration = row._configuration(pinned, method_of(pinned, "mdgd"))
    assert configuration["data"]["revisions"] == {"pope/test": "old"}, "not what another row has brought there since"


def test_jobs_that_share_a_folder_write_its_commits_down_in_turn(tmp_path, monkeypatch):
    """One that read before another wrote would take that one's commits out again, and its rows could not go on."""

    def written(path, text):
        other = multiprocessing.get_context("fork").Process(target=enter)
        other.start()
        other.join()
        codes.append(other.exitcode)
        path.write_text(text)

    def enter():
        with alone_in(tmp_path, "revisions.json.lock"):
            pass

    codes = []
    monkeypatch.setattr(rows, "write", written)
    monkeypatch.setattr(work, "_COMMITS", {"pope/test": "new"})
    assert rows.pin(tmp_path) == {"pope/test": "new"}
    assert codes == [1], "the other was kept out"


def test_a_missing_reporter_is_refused_before_anything_is_loaded(everything, tmp_path):
    asked = ("run", "llava-okvqa", "--method", "zero-shot", "--results", tmp_path, *everything)
    done = call(*asked, "--set", "training.report_to=wandbee")
    assert done.exit_code == 2
    assert "training.report_to: wandbee is not installed, or is none of" in done.output
    assert not list(tmp_path.glob("*/*/config.json"))

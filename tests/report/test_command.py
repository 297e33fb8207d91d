"""``python -m torch_mdgd.report``: folders in, a table, JSON and a page out."""

import builtins
import json
import sys

import pytest
import torch

from tests.report import folders
from torch_mdgd import MDGDOptimizer
from torch_mdgd.delta import save_delta
from torch_mdgd.report import drawn_probes
from torch_mdgd.report.__main__ import main


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "before"
    folders.model().save_pretrained(folder)
    folders.processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i, probe in enumerate(drawn_probes(1)):
        probe.image().save(folder / f"{i}.png")
        line = {"image": f"{i}.png", "question": probe.question, "answer": probe.answer, "task": probe.task}
        lines.append({**line, "choices": probe.choices} if i else line)
    (folder / "probes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(before, after, out, *more):
    assert main([str(before), str(after), "--out", str(out), "--device", "cpu", *map(str, more)]) == 0
    found = json.loads((out / "report.json").read_text())
    assert "<img" in (out / "report.html").read_text()
    return found


def test_two_folders(before, data, tmp_path, capsys):
    folders.moved(folders.model()).save_pretrained(tmp_path / "after")
    found = run(before, tmp_path / "after", tmp_path / "out", "--data", data, "--new-task", data, "--limit", 4)
    probes, new_task = found["sets"]
    assert (probes["name"], new_task["name"]) == ("probes", "new task")
    assert probes["total"]["count"] == new_task["total"]["count"] == 4
    assert [x["task"] for x in probes["scores"]] == ["shape", "colour", "count", "position"]
    assert probes["scores"][0]["restricted"] is None
    assert probes["kl"] > 0
    assert [x["layer"] for x in probes["layers"]] == [0, 1, 2]
    assert (found["before"], found["after"]) == (str(before), str(tmp_path / "after"))
    printed = capsys.readouterr()
    assert "Forgetting: " in printed.out
    assert "report.html" in printed.out
    assert "before: 100%" in printed.err


def test_an_adapter_and_a_delta_on_the_first_folder(before, data, tmp_path):
    peft = pytest.importorskip("peft")
    targets = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    peft.get_peft_model(folders.model(), targets).save_pretrained(tmp_path / "adapter")
    model = folders.model()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    gradients = [0.05 * torch.ones_like(p) for p in model.parameters()]
    optimizer.set_gradients(task=gradients, visual=gradients, reference_task=gradients, reference_visual=gradients)
    optimizer.step()
    save_delta(model, tmp_path / "delta.safetensors", optimizer)
    for after, dtype in (("adapter", "bfloat16"), ("delta.safetensors", "auto")):
        more = ("--data", data, "--limit", 1, "--dtype", dtype)
        found = run(before, tmp_path / after, tmp_path / f"out-{after}", *more)
        assert found["sets"][0]["kl"] > 0
        assert found["sets"][0]["layers"][-1]["drift"] > 0


def test_weights_that_were_saved_in_another_dtype_have_not_moved(before, data, tmp_path, capsys):
    rounded = folders.model().bfloat16()
    rounded.save_pretrained(tmp_path / "rounded")
    rounded.float().save_pretrained(tmp_path / "after")
    folders.processor().save_pretrained(tmp_path / "rounded")
    found = run(tmp_path / "rounded", tmp_path / "after", tmp_path / "out", "--data", data, "--limit", 1)
    assert "BEFORE is in bfloat16 and AFTER in float32: both are measured in float32" in capsys.readouterr().out
    (probes,) = found["sets"]
    assert probes["kl"] == 0
    assert [x["drift"] for x in probes["layers"]] == [0, 0, 0]


def test_what_is_wrong_is_said_without_a_traceback(before, data, tmp_path, capsys, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(b"")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}")
    for arguments, message in (
        ((tmp_path, before), "has no config.json"),
        ((before, tmp_path / "nowhere"), "nowhere is no folder of a model or an adapter, and no delta"),
        ((before, adapter, "--data", data, "--limit", 1), "adapter has no safetensors files, but pickles"),
        ((before, before, "--data", bad), "bad.jsonl, line 1: the key 'image' is missing"),
        ((before, before, "--limit", 0), "--limit must be a whole number of at least 1, got 0"),
    ):
        assert main([str(x) for x in arguments] + ["--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    hide(monkeypatch, "transformers")
    assert main([str(before), str(before)]) == 1
    assert "pip install 'torch-mdgd[transformers]'" in capsys.readouterr().err


def hide(monkeypatch, name):
    """No import of a package inside."""
    really = builtins.__import__

    def importing(module, *args, **kwargs):
        if module.split(".")[0] == name:
            raise ImportError(f"no {name}")
        return really(module, *args, **kwargs)

    for module in [x for x in sys.modules if x.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", importing)


def test_the_table_is_plain_without_rich(monkeypatch, capsys):
    from torch_mdgd.report import ForgettingReport

    model = folders.model()
    found = ForgettingReport(model, folders.processor(), drawn_probes(1), new_tokens=1).measure(model)
    found.show()
    rich = capsys.readouterr().out
    hide(monkeypatch, "rich")
    found.show()
    plain = capsys.readouterr().out
    assert plain == f"{found}\n"
    for text in (rich, plain):
        assert "background" in text
        assert "effective rank" in text
    assert "┃" in rich
    assert "┃" not in plain

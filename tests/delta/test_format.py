"""The format as ``docs/delta.md`` describes it, read without the package, and what ``show`` prints of it."""

import copy
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer, Random
from torch_mdgd.delta import fingerprint, save_delta
from torch_mdgd.delta.__main__ import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "delta.md").read_text(encoding="utf-8")


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2, dtype=torch.bfloat16))
    model[0].to(memory_format=torch.channels_last)
    return model


@pytest.fixture
def saved(tmp_path):
    """The base model, the fine-tuned one, and the folder of its delta."""
    base = make()
    model = copy.deepcopy(base)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), mask=Random(0.3))
    rows = [torch.ones_like(p) for p in model.parameters()]
    optimizer.set_gradients(
        task=rows, visual=[None] * len(rows), reference_task=rows, reference_visual=[None] * len(rows)
    )
    optimizer.step()
    model[1].running_mean += 1
    save_delta(model, tmp_path / "delta.safetensors", optimizer)
    return base, model, tmp_path


def test_the_pages_reader_applies_a_delta(saved, monkeypatch):
    base, model, folder = saved
    (reader,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "torch_mdgd" not in reader
    monkeypatch.chdir(folder)
    exec(reader, {"model": base})
    assert_same_bits(list(base.state_dict().values()), list(model.state_dict().values()))


def hashed(tensors, head=""):
    """By hand, as the page says."""
    digest = hashlib.sha256(head.encode())
    for key in sorted(tensors):
        x = tensors[key].detach().contiguous()
        digest.update(f"{key} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}\n".encode())
        digest.update(bytes(x.reshape(-1).view(torch.uint8).tolist()))
    return digest.hexdigest()


def test_keys_and_metadata_are_those_of_the_page(saved):
    base, model, folder = saved
    with safe_open(folder / "delta.safetensors", framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert metadata.keys() == {"format", "base", "parameters", "checksum"}
    assert metadata["format"] == "torch_mdgd delta 2"
    assert metadata["format"] in PAGE
    assert metadata["base"] == hashed(dict(base.named_parameters())) == fingerprint(base)
    head = "".join(f"{metadata[key]}\n" for key in ("format", "base", "parameters"))
    assert metadata["checksum"] == hashed(tensors, head)
    shapes = {name: (str(p.dtype).removeprefix("torch."), list(p.shape)) for name, p in base.named_parameters()}
    assert {name: tuple(x) for name, x in json.loads(metadata["parameters"]).items()} == shapes
    buffers = {f"{name}.buffer": x for name, x in model.named_buffers()}
    wanted = {}
    for name, p in model.named_parameters():
        before = dict(base.named_parameters())[name]
        at = (p != before).flatten().nonzero().squeeze(1)
        if len(at):
            wanted |= {f"{name}.positions": at.int(), f"{name}.values": p.detach().flatten()[at]}
    assert tensors.keys() == {*wanted, *buffers}
    for key, x in {**wanted, **buffers}.items():
        assert tensors[key].shape == x.shape
        assert_same_bits([tensors[key]], [x])


def test_show_prints_names_counts_shapes_and_the_fingerprint(saved, capsys):
    base, model, folder = saved
    assert main(["show", str(folder / "delta.safetensors")]) == 0
    found = capsys.readouterr().out
    total = sum(p.numel() for p in base.parameters())
    moved = sum(int((p != q).sum()) for p, q in zip(base.parameters(), model.parameters(), strict=True))
    assert fingerprint(base) in found
    assert f"{moved} of {total} elements" in found
    weight = int((base[0].weight != model[0].weight).sum())
    assert re.search(rf"^0\.weight +{weight} of 108  float32 of shape \(4, 3, 3, 3\)$", found, re.MULTILINE)
    assert re.search(r"^1\.running_mean +4  buffer, float32 of shape \(4,\)$", found, re.MULTILINE)


@pytest.mark.parametrize("content", [None, b"", b"no tensors", "other"])
def test_show_says_what_is_wrong_with_another_file(tmp_path, capsys, content):
    path = tmp_path / "file"
    if content == "other":
        from safetensors.torch import save_file

        save_file({"x": torch.ones(2)}, path)
    elif content is not None:
        path.write_bytes(content)
    assert main(["show", str(path)]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert str(path) in found.err
    assert "Traceback" not in found.err


def test_show_is_a_command(saved):
    _, _, folder = saved
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "torch_mdgd.delta", "show"]
    done = subprocess.run([*command, folder / "delta.safetensors"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.weight" in done.stdout
    assert done.stderr == ""

"""Everything is checked before anything is written, whoever wrote the file."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer, Project
from torch_mdgd.delta import apply_delta, save_delta
from torch_mdgd.delta.file import FORMAT, digest


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def saved(path, factor=1.0):
    model = make()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), Project())
    rows = [factor * (torch.arange(p.numel()).view(p.shape) % 2) for p in model.parameters()]
    optimizer.set_gradients(task=rows, visual=[None] * len(rows))
    optimizer.step()
    save_delta(model, path, optimizer)
    return model


def rewritten(path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Another file with a checksum of its own: not damaged, but wrong."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    head = f"{FORMAT}\n{metadata['base']}\n{metadata['parameters']}\n"
    save_file(tensors, path, {**metadata, "checksum": digest(tensors.items(), head)})


def sets(key, value):
    return lambda tensors, metadata: tensors.__setitem__(key, value(tensors[key]))


def of_metadata(change):
    def run(tensors, metadata):
        parameters = json.loads(metadata["parameters"])
        change(parameters)
        metadata["parameters"] = json.dumps(parameters)

    return run


AT, VALUES = "1.weight.positions", "1.weight.values"
WRONG = {
    "outside": (sets(AT, lambda x: torch.cat([x[:-1], x.new_tensor([8])])), "lie outside its 8 elements"),
    "far outside": (sets(AT, lambda x: torch.cat([x[:-1], x.new_tensor([2**31 - 1])])), "lie outside"),
    "negative": (sets(AT, lambda x: torch.cat([x.new_tensor([-1]), x[1:]])), "lie outside"),
    "not sorted": (sets(AT, lambda x: x.flip(0)), "(lie outside|do not ascend)"),
    "two swapped": (sets(AT, lambda x: x[[0, 2, 1, 3]]), "do not ascend"),
    "twice": (sets(AT, lambda x: x[[0, 1, 1, 3]]), "do not ascend"),
    "too few": (sets(AT, lambda x: x[:-1].clone()), r"values of torch.float32, \(4,\) at positions of shape \(3,\)"),
    "floats": (sets(AT, lambda x: x.float()), "'1.weight' has no positions"),
    "matrix": (sets(AT, lambda x: x.view(2, 2).clone()), "at positions of shape"),
    "another dtype": (sets(VALUES, lambda x: x.double()), "has values of torch.float64"),
    "no positions": (lambda tensors, metadata: tensors.pop(AT), "'1.weight' has no positions"),
    "no values": (lambda tensors, metadata: tensors.pop(VALUES), "neither values with positions nor a buffer"),
    "more": (
        lambda tensors, metadata: tensors.update(more=torch.ones(1)),
        "'more' is neither values with positions nor a buffer",
    ),
    "no such parameter": (of_metadata(lambda names: names.pop("1.weight")), "'1.weight' is none of the parameters"),
    "no names": (lambda tensors, metadata: metadata.update(parameters="?"), "not a well-formed delta"),
    "other names": (lambda tensors, metadata: metadata.update(parameters="[1]"), "not a well-formed delta"),
    "a parameter more": (
        of_metadata(lambda names: names.update(b=["float32", [2]])),
        "made for another model: its parameter 'b' is float32 of shape",
    ),
    "another shape": (
        of_metadata(lambda names: names.update({"1.weight": ["float32", [4, 2]]})),
        r"parameter '1.weight' is float32 of shape \(4, 2\), this model's is float32 of shape \(2, 4\)",
    ),
    "another base": (lambda tensors, metadata: metadata.update(base="0" * 64), "fingerprint 000000000000…"),
    "another format": (lambda tensors, metadata: metadata.update(format="torch_mdgd delta 1"), "not a delta of this"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_with_a_right_checksum_is_refused_and_nothing_is_written(tmp_path, wrong):
    change, message = WRONG[wrong]
    saved(tmp_path / "d")
    rewritten(tmp_path / "d", change)
    model = make()
    with pytest.raises(ValueError, match=f"{tmp_path / 'd'}: .*{message}"):
        apply_delta(model, tmp_path / "d")
    assert_same_bits(list(model.parameters()), list(make().parameters()))


def test_the_same_file_rewritten_is_taken(tmp_path):
    tuned = saved(tmp_path / "d")
    rewritten(tmp_path / "d", lambda tensors, metadata: None)
    model = make()
    apply_delta(model, tmp_path / "d")
    assert_same_bits(list(model.parameters()), list(tuned.parameters()))


@pytest.mark.parametrize("key", ["base", "parameters"])
def test_the_checksum_is_of_the_metadata_too(tmp_path, key):
    saved(tmp_path / "d")
    content = (tmp_path / "d").read_bytes()
    with safe_open(tmp_path / "d", framework="pt") as file:
        value = file.metadata()[key]
    old = json.dumps(value)[1:-1].encode()
    assert content.count(old) == 1
    new = (
        old.replace(b"float32", b"float16") if key == "parameters" else old[:-1] + (b"0" if old[-1:] != b"0" else b"1")
    )
    (tmp_path / "d").write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match="do not match their checksum"):
        apply_delta(make(), tmp_path / "d")


def test_a_delta_of_nothing(tmp_path):
    model = make()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), Project())
    assert save_delta(model, tmp_path / "d", optimizer) == 0
    apply_delta(model, tmp_path / "d").undo()


class TestUndo:
    """In the opposite order, or not at all."""

    def two(self, tmp_path):
        """The second was made on the model with the first."""
        first = saved(tmp_path / "first")
        second = copy.deepcopy(first)
        optimizer = MDGDOptimizer(torch.optim.SGD(second.parameters(), lr=0.5), Project())
        optimizer.set_gradients(task=[torch.ones_like(p) for p in second.parameters()], visual=[None] * 4)
        optimizer.step()
        save_delta(second, tmp_path / "second", optimizer)
        model = make()
        return model, [apply_delta(model, tmp_path / name) for name in ("first", "second")], first

    def test_the_last_first(self, tmp_path):
        model, (first, second), between = self.two(tmp_path)
        second.undo()
        assert_same_bits(list(model.parameters()), list(between.parameters()))
        first.undo()
        assert_same_bits(list(model.parameters()), list(make().parameters()))

    def test_another_order_is_refused_and_changes_nothing(self, tmp_path):
        model, (first, second), _ = self.two(tmp_path)
        before = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=r"undo: '.*' does not hold what this delta wrote: undo later"):
            first.undo()
        assert_same_bits(list(model.parameters()), list(before.parameters()))
        second.undo()
        first.undo()
        assert_same_bits(list(model.parameters()), list(make().parameters()))

    def test_after_training_or_a_cast_it_is_refused(self, tmp_path):
        saved(tmp_path / "d")
        model = make()
        applied = apply_delta(model, tmp_path / "d")
        with torch.no_grad():
            # Only the last parameter, which is looked at last.
            model[1].bias += 1
        before = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=r"undo: '1\.bias' does not hold"):
            applied.undo()
        assert_same_bits(list(model.parameters()), list(before.parameters()))
        other = make()
        applied = apply_delta(other, tmp_path / "d")
        other.double()
        with pytest.raises(RuntimeError, match="cast"):
            applied.undo()

    def test_zeros_of_another_dtype_are_not_what_was_written(self, tmp_path):
        model = nn.Linear(2, 1, bias=False, dtype=torch.float16)
        nn.init.ones_(model.weight)
        base = copy.deepcopy(model)
        optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), Project())
        optimizer.set_gradients(task=[torch.ones(1, 2)], visual=[None])
        optimizer.step()
        save_delta(model, tmp_path / "d", optimizer)
        applied = apply_delta(base, tmp_path / "d")
        base.bfloat16()
        with pytest.raises(RuntimeError, match="undo: 'weight' does not hold"):
            applied.undo()

    def test_twice_does_nothing_more(self, tmp_path):
        saved(tmp_path / "d")
        model = make()
        applied = apply_delta(model, tmp_path / "d")
        applied.undo()
        with torch.no_grad():
            model[1].bias += 1
        before = copy.deepcopy(model)
        applied.undo()
        assert_same_bits(list(model.parameters()), list(before.parameters()))

"""Buffers that change while a model is trained, also in frozen parts, travel with the delta."""

import copy

import pytest
import torch
from torch import nn

from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer, Project, Random
from torch_mdgd.delta import apply_delta, save_delta


def make(large=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    model.register_buffer("step", torch.zeros((), dtype=torch.int64))
    model.register_buffer("seen", torch.zeros(3, dtype=torch.bool))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    if large:
        model.register_buffer("table", torch.zeros(large))
    return model.train()


def tune(model, compact=False):
    parameters = list(model[2].parameters())
    mask = {"mask": Random(0.5), "compact": compact}
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.5), Project(), **mask)
    for _ in range(2):
        with optimizer.capture("task"):
            model(torch.randn(6, 4)).square().sum().backward()
        optimizer.set_gradients(visual=[None, None])
        optimizer.step()
        optimizer.zero_grad()
    model.step += 2
    model.seen[1] = True
    model.scratch += 1
    return optimizer


def state(model):
    return list(model.state_dict().values())


@pytest.mark.parametrize("compact", [False, True])
def test_they_are_applied_and_undone(tmp_path, compact):
    model = make()
    base = copy.deepcopy(model)
    optimizer = tune(model, compact)
    assert not torch.equal(model[1].running_mean, base[1].running_mean)
    save_delta(model, tmp_path / "d", optimizer)
    target = copy.deepcopy(base)
    applied = apply_delta(target, tmp_path / "d")
    assert_same_bits(state(target), state(model))
    assert not target.scratch.any()
    applied.undo()
    assert_same_bits(state(target), state(base))


def test_the_base_may_have_been_used_meanwhile(tmp_path):
    model = make()
    base = copy.deepcopy(model)
    save_delta(model, tmp_path / "d", tune(model))
    with torch.no_grad():
        base(torch.randn(6, 4))
    apply_delta(base, tmp_path / "d")
    assert_same_bits(state(base), state(model))


@pytest.mark.parametrize(("size", "travels"), [(65_536, True), (65_537, False)])
def test_a_large_one_is_of_the_base_model(tmp_path, size, travels):
    model = make(size)
    base = copy.deepcopy(model)
    optimizer = tune(model)
    model.table[-1] = 1
    save_delta(model, tmp_path / "d", optimizer)
    assert ((tmp_path / "d").stat().st_size > 4 * size) == travels
    if travels:
        apply_delta(base, tmp_path / "d")
        assert base.table[-1] == 1
    else:
        with pytest.raises(ValueError, match="fingerprint"):
            apply_delta(base, tmp_path / "d")


@pytest.mark.parametrize("change", ["missing", "more", "shape", "dtype"])
def test_a_model_with_other_buffers_is_refused_by_name(tmp_path, change):
    model = make()
    base = copy.deepcopy(model)
    save_delta(model, tmp_path / "d", tune(model))
    if change == "missing":
        del base.seen
    elif change == "more":
        base.register_buffer("another", torch.zeros(1))
    else:
        base.seen = torch.zeros(4, dtype=torch.bool) if change == "shape" else torch.zeros(3)
    before = copy.deepcopy(base)
    name = "another" if change == "more" else "seen"
    with pytest.raises(ValueError, match=f"made for another model: its buffer '{name}' is"):
        apply_delta(base, tmp_path / "d")
    assert_same_bits(state(base), state(before))

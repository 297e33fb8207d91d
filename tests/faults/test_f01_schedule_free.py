"""Optimizers with a training and an evaluation mode: the wrapper has the two where the wrapped optimizer has them."""

import copy
import importlib

import pytest
import torch
from torch import nn

from tests.faults.optimizers import ScheduleFree
from tests.properties import assert_same_bits
from torch_mdgd import MDGD, Given, MDGDOptimizer, Project, Random, StepProject


def normal(seed):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


def library(name):
    def make(parameters):
        return getattr(importlib.import_module("schedulefree"), name)(parameters, lr=0.25)

    return make


BASES = {
    "own": ScheduleFree,
    "own, decay": lambda p: ScheduleFree(p, weight_decay=0.125),
    "SGDScheduleFree": library("SGDScheduleFree"),
    "AdamWScheduleFree": library("AdamWScheduleFree"),
}
STORAGES = {
    "unmasked": {},
    "dense": {"mask": Random(0.5)},
    "compact": {"mask": Random(0.5), "compact": True},
}


def make_base(name, parameters):
    if "Schedule" in name:
        pytest.importorskip("schedulefree")
    return BASES[name](parameters)


def step(optimizer, seed):
    optimizer.set_gradients(task=[normal(seed)], visual=[None])
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("base", BASES)
def test_with_d_of_g_it_is_the_bare_optimizer(base):
    bare, p = nn.Parameter(normal(0)), nn.Parameter(normal(0))
    plain = make_base(base, [bare])
    optimizer = MDGDOptimizer(make_base(base, [p]), Project())
    for modes in (plain, optimizer):
        modes.train()
    for seed in (1, 2, 3):
        bare.grad = normal(seed)
        plain.step()
        plain.zero_grad()
        step(optimizer, seed)
        for mode in ("eval", "train"):
            for modes in (plain, optimizer):
                getattr(modes, mode)()
            assert_same_bits([p], [bare])


@pytest.mark.parametrize("storage", ["dense", "compact"])
@pytest.mark.parametrize("base", BASES)
def test_no_mode_moves_an_element_outside_the_mask(base, storage):
    p = nn.Parameter(normal(0))
    optimizer = MDGDOptimizer(make_base(base, [p]), Project(), **STORAGES[storage])
    optimizer.train()
    for seed in (1, 2):
        step(optimizer, seed)
    seen = [p.detach().clone()]
    for mode in ("eval", "train", "eval"):
        getattr(optimizer, mode)()
        seen.append(p.detach().clone())
    for x in seen:
        assert int((x != normal(0)).sum()) == 6
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[2], seen[0])
    with optimizer.reference():
        assert_same_bits([p], [normal(0)])


@pytest.mark.parametrize("base", BASES)
def test_compact_storage_has_the_numbers_of_the_dense_one(base):
    outcomes = []
    for storage in ("dense", "compact"):
        p = nn.Parameter(normal(0))
        optimizer = MDGDOptimizer(make_base(base, [p]), StepProject(), **STORAGES[storage])
        optimizer.train()
        for seed in (1, 2, 3):
            step(optimizer, seed)
        optimizer.eval()
        outcomes.append(p.detach())
    torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("base", BASES)
def test_it_is_saved_in_evaluation_mode_and_goes_on(base, storage):
    def make(values):
        p = nn.Parameter(values)
        return p, MDGDOptimizer(make_base(base, [p]), MDGD(regularize=0), **STORAGES[storage])

    p, optimizer = make(normal(0))
    optimizer.train()
    for seed in (1, 2):
        step(optimizer, seed)
    optimizer.eval()
    q, other = make(p.detach().clone())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, other):
        each.train()
        step(each, 3)
        each.eval()
    assert_same_bits([q], [p])


def test_the_modes_are_there_only_where_the_wrapped_optimizer_has_them():
    optimizer = MDGDOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))]))
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "eval")
    with pytest.raises(AttributeError, match="'MDGDOptimizer' object has no attribute 'eval'"):
        optimizer.eval()
    fused = MDGDOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))], fused=True))
    assert not hasattr(fused, "_step_supports_amp_scaling")


def test_no_mode_is_changed_while_the_reference_is_in_the_parameters():
    p = nn.Parameter(normal(0))
    optimizer = MDGDOptimizer(ScheduleFree([p]), Project())
    optimizer.train()
    step(optimizer, 1)
    with optimizer.reference(), pytest.raises(RuntimeError, match=r"eval: leave capture\(\) and reference\(\) first"):
        optimizer.eval()


def test_a_frozen_parameter_of_whole_numbers_has_no_mode():
    frozen = nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
    p = nn.Parameter(normal(0))
    optimizer = MDGDOptimizer(ScheduleFree([frozen, p]), Project(), mask=Given([torch.ones(3, 4) > 0]), compact=True)
    optimizer.train()
    optimizer.set_gradients(task=[None, normal(1)], visual=[None, None])
    optimizer.step()
    optimizer.eval()
    assert frozen.tolist() == [0, 1, 2, 3]

"""A copy that is made in the middle of a step goes on from there: with what is captured, without what is in .grad."""

import copy
import pickle

import pytest
import torch

from tests.faults.registry import PAIRS, RULES, STORAGES, Branches, normal, train
from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer
from torch_mdgd.rules.base import KINDS

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


def make(rule, storage):
    model = Branches()
    base = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
    optimizer = MDGDOptimizer(base, RULES[rule](model), **STORAGES[storage])
    train(model, optimizer, range(2))
    return model, optimizer


def capture(model, optimizer):
    given = {
        kind: [normal(p.shape, 50 + 10 * i + k) for k, p in enumerate(model.parameters())]
        for i, kind in enumerate(KINDS)
        if kind in optimizer.needs()
    }
    optimizer.set_gradients(**given)
    optimizer.rule.saw_features(normal((4, 6), 1), normal((4, 6), 2))


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize(("rule", "storage"), PAIRS)
def test_between_capture_and_combine(rule, storage, copied):
    model, optimizer = make(rule, storage)
    capture(model, optimizer)
    other, its = COPIES[copied]((model, optimizer))
    for each in (optimizer, its):
        each.step()
    assert_same_bits(list(other.parameters()), list(model.parameters()))


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize(("rule", "storage"), PAIRS)
def test_between_combine_and_step(rule, storage, copied):
    model, optimizer = make(rule, storage)
    capture(model, optimizer)
    optimizer.combine()
    before = copy.deepcopy(list(model.parameters()))
    other, its = COPIES[copied]((model, optimizer))
    # As everywhere in torch, a copy of a parameter has no gradient.
    assert all(p.grad is None for p in other.parameters())
    its.step()
    assert_same_bits(list(other.parameters()), before)
    third, last = COPIES[copied]((model, optimizer))
    for p, q in zip(model.parameters(), third.parameters(), strict=True):
        q.grad = p.grad.clone()
    for each in (optimizer, last):
        each.step()
        each.zero_grad()
    assert_same_bits(list(third.parameters()), list(model.parameters()))
    assert not torch.equal(model.a.weight, before[0])
    for each, its_optimizer in ((model, optimizer), (third, last)):
        train(each, its_optimizer, range(5, 6))
    assert_same_bits(list(third.parameters()), list(model.parameters()))

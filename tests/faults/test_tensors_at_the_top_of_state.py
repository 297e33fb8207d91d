"""An optimizer may hold more in ``state`` than its parameters' entries."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.faults.optimizers import Counting
from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer, Project, Random

STORAGES = {
    "unmasked": {},
    "dense": {"mask": Random(0.5)},
    "compact": {"mask": Random(0.5), "compact": True},
}


def make(storage):
    p = nn.Parameter(torch.arange(6.0))
    return p, MDGDOptimizer(Counting([p], lr=0.5, momentum=0.5), Project(), **STORAGES[storage])


def step(optimizer):
    optimizer.set_gradients(task=[torch.ones(6)], visual=[None])
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("storage", STORAGES)
def test_it_is_saved_loaded_and_copied(storage):
    p, optimizer = make(storage)
    for _ in range(2):
        step(optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q, other = make(storage)
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(torch.load(file, weights_only=True))
    r, third = copy.deepcopy((p, optimizer))
    for each in (optimizer, other, third):
        step(each)
        assert float(each.state["steps"]) == 3
    assert_same_bits([q, r], [p, p])

"""A compact wrapper's base answers as any optimizer does, also when its own state dict or state is asked for."""

import copy

import pytest
import torch
from torch import nn

from torch_mdgd import MDGDOptimizer, Project, Random

ASKED = {
    "base.state_dict": lambda o, p: o.base.state_dict(),
    "base.state": lambda o, p: o.base.state[p],
    "state": lambda o, p: o.state[p],
    "a frozen parameter's state": lambda o, p: o.state.get(p),
    "repr": lambda o, p: repr(o.base),
    "zero_grad": lambda o, p: o.base.zero_grad(),
    "copy": lambda o, p: copy.deepcopy(o.base),
}


def make():
    p = nn.Parameter(torch.arange(9.0))
    return p, MDGDOptimizer(torch.optim.AdamW([p], lr=0.5), Project(), mask=Random(0.5), compact=True)


def step(optimizer):
    optimizer.set_gradients(task=[torch.ones(9)], visual=[None])
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("stepped", [0, 1])
@pytest.mark.parametrize("asked", ASKED)
def test_asking_changes_nothing(asked, stepped):
    outcomes = []
    for ask in (lambda o, p: None, ASKED[asked]):
        p, optimizer = make()
        for _ in range(stepped):
            step(optimizer)
        if stepped:
            # Before a first step a question makes an entry, as in torch, and an entry counts as initialised.
            ask(optimizer, p)
        state = copy.deepcopy(optimizer.state_dict())
        step(optimizer)
        outcomes.append([p.detach(), *(x for entry in state["state"].values() for x in entry.values())])
    for x, y in zip(*outcomes, strict=True):
        assert torch.equal(x, y)


def test_the_state_of_the_selected_elements_stands_under_the_parameter():
    p, optimizer = make()
    step(optimizer)
    assert set(optimizer.base.state) == {p}
    kept = round(0.5 * 9)
    assert {name: x.shape for name, x in optimizer.state[p].items()} == {
        "step": (),
        "exp_avg": (kept,),
        "exp_avg_sq": (kept,),
    }
    assert optimizer.base.state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}

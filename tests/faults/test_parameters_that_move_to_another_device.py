"""What is kept of parameters follows them to another device."""

import copy

import pytest
import torch

from tests.faults.registry import DEVICES, PAIRS, RULES, STORAGES, Branches, train
from torch_mdgd import MDGDOptimizer

AWAY = [device for device in DEVICES if device != "cpu"]
pytestmark = pytest.mark.skipif(not AWAY, reason="one device")


def to(model, optimizer, device):
    """As accelerate and Lightning do: the same parameters, and the wrapped optimizer's state by themselves."""
    for p in model.parameters():
        p.data = p.data.to(device)
    for state in optimizer.base.state.values():
        state.update({name: x.to(device) for name, x in state.items() if isinstance(x, torch.Tensor)})


def outcome(rule, storage, places):
    model = Branches()
    base = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
    optimizer = MDGDOptimizer(base, RULES[rule](model), **STORAGES[storage])
    for step, device in enumerate(places):
        to(model, optimizer, device)
        train(model, optimizer, range(step, step + 1))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("device", AWAY)
@pytest.mark.parametrize(("rule", "storage"), PAIRS)
def test_a_run_goes_on(rule, storage, device):
    wanted = outcome(rule, storage, ["cpu"] * 4)
    found = outcome(rule, storage, ["cpu", device, device, "cpu"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

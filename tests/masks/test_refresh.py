"""When a mask is chosen: what a warm-up adds up."""

import pytest
import torch
from torch import nn

from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer, TopK
from torch_mdgd.roles import ROLES

STEPS = (torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([-8.0, 0.0, 5.0, 0.5]), torch.tensor([1.0, 9.0, 1.0, 7.0]))


def wrapped(warmup):
    return MDGDOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(4))], lr=0.1), mask=TopK(0.25, warmup=warmup))


def step(optimizer, g, scale=None):
    if scale is None:
        optimizer.set_gradients(**{role: [g * (role != "visual")] for role in ROLES[:2]})
        optimizer.set_gradients(reference_task=[g], reference_visual=[0 * g])
    else:
        (p,) = optimizer.parameters
        with optimizer.reference():
            capture(optimizer, p, g, scale)
        capture(optimizer, p, g, scale)
    optimizer.combine()
    for p in optimizer.parameters:
        p.grad /= scale or 1.0
    optimizer.step()
    optimizer.zero_grad()


def capture(optimizer, p, g, scale):
    for role, x in (("visual", 0 * g), ("task", g)):
        with optimizer.capture(role, scale=scale):
            (p @ x * scale).backward()


def mask(optimizer):
    return optimizer.state_dict()["state"][0]["mdgd_mask"].tolist()


@pytest.mark.parametrize("masked", [False, True])
def test_what_was_added_up_before_a_state_dict_was_loaded_is_forgotten(masked):
    fresh, other = wrapped(2), wrapped(2)
    state = fresh.state_dict()
    if masked:
        # A run that is asked again after its mask was chosen, in the middle of another's warm-up.
        for g in STEPS[1:]:
            step(fresh, g)
        state = fresh.state_dict()
    step(other, STEPS[0])
    other.load_state_dict(state)
    for g in STEPS[1:]:
        step(other, g)
    if not masked:
        for g in STEPS[1:]:
            step(fresh, g)
        # With the first step's gradients it would be another.
        assert mask(fresh) == [False, True, False, False]
    assert mask(other) == mask(fresh)
    assert not other._schedule.sums


def test_steps_of_a_warm_up_count_alike_whatever_their_loss_scale():
    outcomes = []
    for scales in ((None, None), (8.0, 1.0), (0.5, 2.0)):
        optimizer = wrapped(2)
        for g, scale in zip(STEPS[:2], scales, strict=True):
            step(optimizer, g, scale)
        outcomes.append(optimizer)
    assert mask(outcomes[0]) == [False, False, True, False]
    for optimizer in outcomes[1:]:
        assert mask(optimizer) == mask(outcomes[0])
        assert_same_bits(optimizer.parameters, outcomes[0].parameters)

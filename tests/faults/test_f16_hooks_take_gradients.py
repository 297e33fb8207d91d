"""Hooks that take or replace gradients during the backward pass are named."""

import warnings

import pytest
import torch
from torch import nn

from tests.faults.optimizers import Offloading
from torch_mdgd import MDGDOptimizer, Project

SEES = r"a parameter has a hook \(register_post_accumulate_grad_hook\): it sees the gradient of each backward pass"


def model_and_optimizer(kind=torch.optim.SGD):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, MDGDOptimizer(kind(model.parameters(), lr=0.5), Project())


def capture(model, optimizer, kind="task"):
    with optimizer.capture(kind):
        model(torch.ones(1, 3)).square().sum().backward()


def test_a_hook_that_steps_is_named_as_the_cause_and_nothing_is_captured():
    model, optimizer = model_and_optimizer()
    own = {p: torch.optim.SGD([p], lr=0.5) for p in model.parameters()}

    def step(p):
        own[p].step()
        own[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    with pytest.warns(UserWarning, match=SEES), pytest.raises(RuntimeError, match="took the gradient of parameter 0"):
        capture(model, optimizer)
    assert not optimizer._captures


def test_one_parameter_with_such_a_hook_is_found_among_others():
    model, optimizer = model_and_optimizer()
    model.bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.warns(UserWarning, match=SEES), pytest.raises(RuntimeError, match="took the gradient of parameter 1"):
        capture(model, optimizer)


def test_a_hook_of_a_parameter_that_a_loss_does_not_reach_took_nothing():
    model, optimizer = model_and_optimizer()
    model.bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.warns(UserWarning, match=SEES), optimizer.capture("visual"):
        (model.weight @ torch.ones(3)).square().sum().backward()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=SEES):
        capture(model, optimizer)


def test_an_optimizer_that_steps_on_what_its_hooks_saw_is_warned_of():
    model, optimizer = model_and_optimizer(Offloading)
    with pytest.warns(UserWarning, match=SEES):
        capture(model, optimizer)


def test_without_such_hooks_nothing_is_said():
    model, optimizer = model_and_optimizer()
    # This one sees gradients on their way, and may scale them.
    model.weight.register_hook(lambda g: 2 * g)
    handle = model.bias.register_post_accumulate_grad_hook(lambda p: None)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(model, optimizer)
        capture(model, optimizer, "visual")
        optimizer.step()

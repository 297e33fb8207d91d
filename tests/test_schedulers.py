"""Learning-rate schedulers, on the wrapper and on the optimizer in it, without warnings."""

import warnings
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler
from transformers import SchedulerType, get_scheduler

from tests import networks
from tests.networks import capture_both, losses
from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer, Project

network = partial(networks.network, torch.float32, bias=False)


def loss_of(model):
    return losses(model)[1]


def plain_step(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def side_by_side(make, steps=3, schedule=None, on_base=False, **settings):
    """Train one model with the plain optimizer and one with the wrapped; schedule(optimizer) gives a callback."""
    outcomes = []
    for wrap in (False, True):
        model = network()
        base = make(model.parameters())
        optimizer = MDGDOptimizer(base, **settings) if wrap else base
        after = schedule(base if on_base else optimizer) if schedule else lambda: None
        rates = []
        for _ in range(steps):
            plain_step(model, optimizer)
            after()
            rates.append([dict(group, params=None) for group in base.param_groups])
        outcomes.append((list(model.parameters()), [[g["lr"] for g in groups] for groups in rates], rates))
    return outcomes


SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.5),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8, cycle_momentum=True),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
}
ELSEWHERE = {"LRScheduler", "_LRScheduler", "ReduceLROnPlateau"}
# What transformers asks for beyond a warm-up and the number of steps.
MORE = {
    "cosine_with_min_lr": {"min_lr": 0.001},
    "cosine_warmup_with_min_lr": {"min_lr": 0.001},
    "warmup_stable_decay": {"num_decay_steps": 2},
}
# Those two step on a metric.
KINDS = [kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")]


def test_every_scheduler_of_torch_is_here():
    kinds = {
        n
        for n, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert kinds == set(SCHEDULES) | ELSEWHERE


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_schedulers_of_transformers_work_on_the_wrapper_and_on_base_without_warnings(name, on_base):
    def schedule(optimizer):
        more = MORE.get(name)
        return get_scheduler(
            name, optimizer, num_warmup_steps=2, num_training_steps=6, scheduler_specific_kwargs=more
        ).step

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, wrapped = side_by_side(lambda p: torch.optim.AdamW(p, lr=0.1), 6, schedule, on_base)
    assert len({tuple(row) for row in plain[1]}) > 1 or name == "constant"
    assert wrapped[1] == plain[1]
    assert_same_bits(wrapped[0], plain[0])


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedulers_of_transformers_that_step_on_a_metric(name, on_base):
    def schedule(optimizer):
        scheduler = get_scheduler(name, optimizer, scheduler_specific_kwargs={"patience": 1, "factor": 0.5})
        return lambda: scheduler.step(1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, wrapped = side_by_side(lambda p: torch.optim.SGD(p, lr=0.1), 5, schedule, on_base)
    assert len({tuple(row) for row in plain[1]}) > 1
    assert wrapped[1] == plain[1]
    assert_same_bits(wrapped[0], plain[0])


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_work_on_the_wrapper_and_on_base_without_warnings(name, kind, on_base):
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, wrapped = side_by_side(make, 6, lambda o: SCHEDULES[name](o).step, on_base)
    assert len({tuple(row) for row in plain[1]}) > 1
    assert wrapped[1] == plain[1]
    if name in ("OneCycleLR", "CyclicLR"):
        key = "momentum" if kind == "sgd" else "betas"
        cycled = [[groups[0][key] for groups in outcome[2]] for outcome in (plain, wrapped)]
        assert cycled[0] == cycled[1]
        assert len(set(cycled[0])) > 1
    assert_same_bits(wrapped[0], plain[0])


@pytest.mark.parametrize("on_base", [False, True])
def test_reduce_on_plateau(on_base):
    def schedule(optimizer):
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.1)
        return lambda: scheduler.step(1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, wrapped = side_by_side(lambda p: torch.optim.SGD(p, lr=0.1), 5, schedule, on_base)
    assert len({tuple(row) for row in plain[1]}) > 1
    assert wrapped[1] == plain[1]
    assert_same_bits(wrapped[0], plain[0])


def test_a_scheduler_before_the_first_step_still_warns():
    # The wrapper must not hide the mistake that torch looks for.
    optimizer = MDGDOptimizer(torch.optim.SGD(network().parameters(), lr=0.1))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_schedulers_work_with_captures():
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Project())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
        seen = []
        for _ in range(3):
            capture_both(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            seen.append(model[0].weight.detach().clone())
    assert not torch.equal(seen[0], network()[0].weight)
    assert_same_bits(seen[1:], [seen[0]] * 2)

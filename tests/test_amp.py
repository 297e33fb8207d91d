"""Gradient scaler and clipping, on the CPU, where they have the same logic as elsewhere."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from tests import networks
from tests.networks import capture_both, capture_needed, losses
from tests.properties import assert_close, assert_same_bits
from tests.strategies import make_case
from torch_mdgd import MDGDOptimizer, Project, StepProject, TopK
from torch_mdgd.rules.base import KINDS

FORMS = {
    "published": {},
    "project": {"rule": Project(0.5)},
    "step": {"rule": StepProject(0.1)},
    "masked": {"mask": TopK(0.3)},
    "compact": {"mask": TopK(0.3), "compact": True},
}
network = partial(networks.network, torch.float32, bias=False)


def scaled_run(base, form, steps=3, scaler=None, clip=None):
    model = network()
    optimizer = MDGDOptimizer(base(model.parameters()), **form)
    for _ in range(steps):
        capture_needed(model, optimizer, scaler)
        if scaler is None:
            if clip:
                optimizer.combine()
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        else:
            optimizer.combine()
            scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return list(model.parameters())


BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("base", BASES)
def test_a_gradient_scaler_changes_nothing(base, name, clip):
    # Scales that are powers of two round nothing away in float32.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    wanted = scaled_run(BASES[base], FORMS[name], clip=clip)
    actual = scaled_run(BASES[base], FORMS[name], clip=clip, scaler=scaler)
    assert scaler.get_scale() == 2.0**13
    assert_close(actual, [p.detach().double() for p in wanted])


@pytest.mark.parametrize("base", ["adamw fused", "sgd fused"])
def test_a_scaler_that_steps_without_unscale_first(base):
    # A fused base says that it unscales by itself. If that shows through, SGD's step is 1024 times too large.
    model, twin = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for m, s in ((model, scaler), (twin, None)):
        optimizer = MDGDOptimizer(BASES[base](m.parameters()), Project())
        capture_both(m, optimizer, s)
        optimizer.combine()
        if s is None:
            optimizer.step()
        else:
            s.step(optimizer)
    assert_close(list(model.parameters()), [p.detach().double() for p in twin.parameters()])


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMS)
def test_an_inf_in_any_gradient_skips_the_step_and_loses_nothing(name, kind, value):
    case = make_case([(3, 4), (5, 2)], (torch.float32,) * 2, 0)
    twins = [nn.Parameter(p.detach().clone()) for p in case.parameters]
    bad = {r: [x.clone() for x in row] for r, row in case.gradients.items()}
    bad[kind][1][0, 0] = value
    base = lambda p: torch.optim.AdamW(p, lr=0.1)  # noqa: E731

    optimizer, plain = MDGDOptimizer(base(case.parameters), **FORMS[name]), MDGDOptimizer(base(twins), **FORMS[name])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for gradients in (case.gradients, bad, case.gradients):
        optimizer.set_gradients(**{r: [scaler.scale(x) for x in row] for r, row in gradients.items()})
        optimizer.combine()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if gradients is not bad:
            plain.set_gradients(**gradients)
            plain.step()
            plain.zero_grad()
    assert scaler.get_scale() == 1.0
    assert_close(case.parameters, [p.detach().double() for p in twins])


def test_an_inf_at_the_step_that_chooses_the_mask_is_skipped_and_the_next_step_chooses():
    case = make_case([(3, 4), (5, 2)], (torch.float32,) * 2, 0)
    start = [p.detach().clone() for p in case.parameters]
    bad = {r: [x.clone() for x in row] for r, row in case.gradients.items()}
    bad["reference_task"][0][0, 0] = math.inf
    optimizer = MDGDOptimizer(torch.optim.AdamW(case.parameters, lr=0.1), mask=TopK(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    for gradients in (bad, case.gradients):
        assert "kept_fraction" not in optimizer.diagnostics
        optimizer.set_gradients(**gradients)
        optimizer.combine()
        scaler.step(optimizer)
        scaler.update()
        # Not the wrapper's zero_grad: a trainer calls the model's.
        for p in case.parameters:
            p.grad = None
        if gradients is bad:
            assert_same_bits(case.parameters, start)
    assert optimizer.diagnostics["kept_fraction"] == 0.5


def test_a_step_that_was_skipped_says_nothing_about_the_next_one():
    # Not the wrapper's zero_grad: a trainer calls the model's.
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), StepProject(0.5))
    capture_both(model, optimizer)
    optimizer.combine()
    model.zero_grad()
    twin = network()
    for m in (model, twin):
        losses(m)[1].backward()
    with pytest.warns(UserWarning, match=r"\.grad was replaced since combine"):
        optimizer.step()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert_same_bits(list(model.parameters()), list(twin.parameters()))


def test_a_step_without_gradients_after_a_skipped_one_moves_nothing():
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), StepProject(0.5))
    capture_both(model, optimizer)
    optimizer.combine()
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert_same_bits(list(model.parameters()), list(network().parameters()))


def test_gradients_changed_in_place_or_partly_taken_away_are_those_of_the_step():
    outcomes = []
    for taken in (False, True):
        model = network()
        optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), StepProject(0.5))
        capture_both(model, optimizer)
        optimizer.combine()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if taken:
            model[2].weight.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        outcomes.append([model[0].weight])
    assert_same_bits(*outcomes)
    plain = network()
    losses(plain)[1].backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert not torch.equal(plain[0].weight, outcomes[0][0])


def test_clipping_acts_on_the_combined_gradient():
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), Project())
    start = [p.detach().clone() for p in model.parameters()]
    capture_both(model, optimizer)
    optimizer.combine()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    moved = torch.cat([(p.detach() - x).reshape(-1) for p, x in zip(model.parameters(), start, strict=True)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)

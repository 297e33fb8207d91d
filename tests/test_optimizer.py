"""Combine and step: what they need, what they refuse, and what they leave behind."""

import math
import warnings

import pytest
import torch
from torch import nn

from tests.networks import capture_both, losses, network
from tests.properties import assert_same_bits
from tests.strategies import make_case
from torch_mdgd import MDGD, MDGDOptimizer, Project, Random, StepProject, TopK
from torch_mdgd.rules.base import KINDS

F64 = (torch.float64,)
TWO = {"rule": Project()}


def sgd(model: nn.Module, rule=None, **settings) -> MDGDOptimizer:
    return MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule, **settings)


# Combine.


@pytest.mark.parametrize("lacking", KINDS)
def test_a_missing_capture_is_named(lacking):
    case = make_case([(3,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1))
    optimizer.set_gradients(**{kind: row for kind, row in case.gradients.items() if kind != lacking})
    with pytest.raises(RuntimeError, match=f"needs the {lacking} gradient, not captured"):
        optimizer.combine()


@pytest.mark.parametrize("verb", ["combine", "step"])
def test_capturing_one_role_alone_is_refused(verb):
    model = network()
    optimizer = sgd(model, **TWO)
    with optimizer.capture("task"):
        losses(model)[1].backward()
    with pytest.raises(RuntimeError, match="needs the visual gradient"):
        getattr(optimizer, verb)()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, 4),
        ({"rule": MDGD(regularize=0)}, 2),
        ({"rule": Project()}, 2),
        ({"rule": StepProject()}, 2),
        ({"rule": Project(), "mask": TopK(0.5)}, 4),
        ({"mask": TopK(0.5)}, 4),
        ({"mask": Random(0.5)}, 2),
    ],
)
def test_what_is_needed_before_the_first_step(settings, wanted):
    assert sgd(network(), **settings).needs() == KINDS[:wanted]


@pytest.mark.parametrize("rule", [MDGD(), Project(), StepProject()])
def test_once_the_mask_is_chosen_gradients_at_the_reference_are_not_needed(rule):
    case = make_case([(9,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), rule, mask=TopK(0.5))
    optimizer.set_gradients(**case.gradients)
    optimizer.step()
    assert optimizer.needs() == KINDS[:2]


def test_a_step_without_pictures_needs_the_task_alone_unless_it_chooses_a_mask():
    case = make_case([(9,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1))
    assert optimizer.needs(pictures=False) == KINDS[:1]
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), mask=TopK(0.5))
    assert optimizer.needs(pictures=False) == KINDS


def test_any_group_that_needs_the_reference_makes_all_four_needed():
    case = make_case([(9,), (4,)], F64 * 2, 0)
    a, b = case.parameters
    base = torch.optim.SGD([{"params": [a]}, {"params": [b], "mdgd_regularize": 1.0}], lr=0.1)
    assert MDGDOptimizer(base, MDGD(regularize=0)).needs() == KINDS


def test_combine_then_step_equals_step():
    models = network(), network()
    for model, both in zip(models, (True, False), strict=True):
        optimizer = sgd(model, **TWO)
        capture_both(model, optimizer)
        if both:
            optimizer.combine()
        optimizer.step()
    assert_same_bits(list(models[0].parameters()), list(models[1].parameters()))


def test_reducing_the_reference_early_changes_nothing():
    case = make_case([(3, 4), (5,)], F64 * 2, 0)
    outcomes = []
    for early in (True, False):
        optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1))
        optimizer.set_gradients(reference_task=case.gradients["reference_task"])
        optimizer.set_gradients(reference_visual=case.gradients["reference_visual"])
        if early:
            optimizer.reduce_reference()
            optimizer.reduce_reference()
        optimizer.set_gradients(task=case.gradients["task"], visual=case.gradients["visual"])
        optimizer.combine()
        outcomes.append([p.grad for p in case.parameters])
        optimizer.zero_grad()
    assert_same_bits(*outcomes)


def test_nothing_is_captured_at_the_reference_after_it_is_reduced():
    model = network()
    optimizer = sgd(model)
    with optimizer.reference():
        capture_both(model, optimizer)
    optimizer.reduce_reference()
    with pytest.raises(RuntimeError, match="has formed g̃₀ of this step already"), optimizer.reference():
        capture_both(model, optimizer)


def test_reducing_without_captures_is_refused():
    optimizer = sgd(network())
    with pytest.raises(RuntimeError, match="reference_task and reference_visual gradients, not captured"):
        optimizer.reduce_reference()


def test_combining_reuses_the_memory_of_the_task_gradient():
    case = make_case([(3, 4)], F64, 0)
    (p,) = case.parameters
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.1), **TWO)
    with optimizer.capture("visual"):
        (p * case.gradients["visual"][0]).sum().backward()
    with optimizer.capture("task"):
        (p * case.gradients["task"][0]).sum().backward()
        address = p.grad.data_ptr()
    optimizer.combine()
    assert p.grad.data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_has_the_dtype_of_its_parameter(dtype):
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.1), **TWO)
    g, v = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    optimizer.set_gradients(task=[g], visual=[v])
    optimizer.combine()
    assert p.grad.dtype == dtype
    assert p.grad.tolist() == [1 - 2.5 + 1, 2, 3, 4 - 2.5 + 1]


# Step.


@pytest.mark.parametrize("settings", [{}, TWO, {"rule": StepProject(0.1)}])
def test_step_with_nothing_captured_is_the_wrapped_step(settings):
    models = network(), network()
    plain = torch.optim.AdamW(models[0].parameters(), lr=0.1)
    wrapped = MDGDOptimizer(torch.optim.AdamW(models[1].parameters(), lr=0.1), **settings)
    for _ in range(3):
        for model, optimizer in zip(models, (plain, wrapped), strict=True):
            optimizer.zero_grad()
            losses(model)[1].backward()
            optimizer.step()
    assert_same_bits(list(models[0].parameters()), list(models[1].parameters()))


def assert_next_step_is_plain(model, optimizer, twin):
    """An uncaptured step of the model is SGD's on its twin, bit for bit, and nothing to be warned of."""
    losses(model)[1].backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    losses(twin)[1].backward()
    plain.step()
    assert_same_bits(list(model.parameters()), list(twin.parameters()))


def test_nothing_of_one_step_reaches_the_next():
    model, twin = network(), network()
    optimizer = sgd(model, StepProject())
    capture_both(model, optimizer)
    optimizer.step()
    # Not the wrapper's zero_grad: a trainer calls the model's.
    model.zero_grad()
    twin.load_state_dict(model.state_dict())
    assert_next_step_is_plain(model, optimizer, twin)


def test_zero_grad_forgets_what_was_combined():
    model, twin = network(), network()
    optimizer = sgd(model, StepProject(0.5))
    capture_both(model, optimizer)
    optimizer.combine()
    optimizer.zero_grad()
    assert_next_step_is_plain(model, optimizer, twin)


def test_zero_grad_forgets_captures():
    model = network()
    optimizer = sgd(model, **TWO)
    capture_both(model, optimizer)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="not captured"):
        optimizer.combine()


def test_nan_when_the_mask_is_chosen_refuses_the_step_and_changes_nothing():
    case = make_case([(3, 4), (5,)], F64 * 2, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), mask=TopK(0.5))
    before = [p.detach().clone() for p in case.parameters]
    bad = {kind: [x.clone() for x in row] for kind, row in case.gradients.items()}
    bad["visual"][1][2] = math.nan
    optimizer.set_gradients(**bad)
    with pytest.raises(RuntimeError, match="NaN or Inf at the step that chooses the mask"):
        optimizer.step()
    assert_same_bits(case.parameters, before)
    assert not case.parameters[1].grad.isfinite().all()
    optimizer.zero_grad()
    optimizer.set_gradients(**case.gradients)
    optimizer.step()
    assert optimizer.diagnostics["kept_fraction"] == round(0.5 * 17) / 17


VERBS = {
    "combine": lambda o: o.combine(),
    "step": lambda o: o.step(),
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict(o.base.state_dict()),
    "add_param_group": lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
}


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_else_may_happen_at_the_reference(verb):
    model = network()
    optimizer = sgd(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    now = model[0].weight.detach().clone()
    with (
        pytest.raises(RuntimeError, match=f"{verb}: leave capture\\(\\) and reference\\(\\) first"),
        optimizer.reference(),
    ):
        VERBS[verb](optimizer)
    assert_same_bits([model[0].weight], [now])


@pytest.mark.parametrize("verb", ["combine", "step"])
def test_no_step_inside_a_capture(verb):
    model = network()
    optimizer = sgd(model)
    start = model[0].weight.detach().clone()
    with optimizer.capture("task"):
        losses(model)[1].backward()
        with pytest.raises(RuntimeError, match=f"{verb}: leave capture"):
            VERBS[verb](optimizer)
    assert_same_bits([model[0].weight], [start])


def test_no_reference_inside_a_capture_or_a_reference():
    model = network()
    optimizer = sgd(model)
    with pytest.raises(RuntimeError, match="already inside"), optimizer.capture("task"), optimizer.reference():
        pass
    with pytest.raises(RuntimeError, match="already inside"), optimizer.reference(), optimizer.reference():
        pass

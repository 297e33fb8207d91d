"""Settings in the parameter groups, and groups that come later."""

import math

import pytest
import torch
from torch import nn

from tests.networks import capture_both, network
from tests.properties import assert_close, assert_same_bits, expected
from tests.strategies import make_case
from torch_mdgd import Given, MDGDOptimizer, TopK, VisualInputs

F64 = (torch.float64,)
TWO = {"update": "project"}
STEP = {"update": "project", "space": "step"}


def sgd(model: nn.Module, **settings) -> MDGDOptimizer:
    return MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update": "plain"}, "update must be one of 'regularize', 'reference', 'project', got 'plain'"),
        ({"space": "time"}, "space must be one of"),
        ({"scope": "row"}, "scope must be one of"),
        ({"align": -1.0}, "align must be a finite number ≥ 0"),
        ({"regularize": math.nan}, "regularize must be a finite number ≥ 0"),
        ({"restore": math.inf, "space": "step", "update": "project"}, "restore must be a finite number ≥ 0"),
        ({"align": "1"}, "align must be a finite number ≥ 0"),
        ({"align": True}, "align must be a finite number ≥ 0"),
        ({"history": 0, **STEP}, "history must be a whole number from 1, got 0"),
        ({"history": 1.5, **STEP}, "history must be a whole number from 1, got 1.5"),
        ({"history": True, **STEP}, "history must be a whole number from 1"),
        ({"history": 2}, "history is of directions in step space: pass space='step'"),
        ({"reference_every": 2.0}, r"reference_every must be a whole number from 1, got 2\.0"),
        ({"drift_budget": -1}, "drift_budget must be a finite number > 0 or None, got -1"),
        ({"drift_budget": "0.1"}, "drift_budget must be a finite number > 0 or None, got '0.1'"),
        ({"drift_budget": 0.1, **STEP}, "drift_budget sets align, .* with space='step'"),
        ({"space": "step"}, "space='step' works with update='project' alone"),
        ({"restore": 0.1}, "restore is a move in step space"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sgd(network(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protect": object(), **STEP}, "protect must be a VisualInputs or None, got object"),
        ({"protect": VisualInputs, **STEP}, "protect must be a VisualInputs or None, got type"),
        ({"mask": 0.1}, "mask must be such as TopK\\(0.1\\), or None, got 0.1"),
        ({"mask": TopK}, "mask must be such as TopK"),
        ({"compact": 0.1, "mask": TopK(0.1)}, "compact must be True or False, got 0.1"),
    ],
)
def test_arguments_of_another_kind_are_refused(settings, message):
    with pytest.raises(TypeError, match=message):
        sgd(network(), **settings)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"align": -1.0}, "align"),
        ({"align": 0.0, "drift_budget": 0.1}, "drift_budget multiplies align"),
        ({"mask": Given([]), "scope": "global"}, "0 masks for 4 parameters"),
        ({"space": "step", "update": "project", "history": 2, "mask": TopK(0.5), "compact": 1}, "compact"),
    ],
)
def test_what_was_refused_leaves_no_settings_behind(bad, message):
    base = torch.optim.SGD(network().parameters(), lr=0.1)
    before = [set(group) for group in base.param_groups]
    with pytest.raises((TypeError, ValueError), match=message):
        MDGDOptimizer(base, **bad)
    assert [set(group) for group in base.param_groups] == before
    assert MDGDOptimizer(base).param_groups[0]["align"] == 1.0


def protecting(model):
    return VisualInputs(model, text_module=model)


CONFLICTS = [
    (lambda m: {**STEP, "history": 2, "scope": "global"}, {"history": 3}, r"history must be the same .* got \[2, 3\]"),
    (lambda m: {"drift_budget": 0.1}, STEP, "drift_budget sets align, .* with space='step'"),
    (lambda m: {**STEP, "protect": protecting(m)}, {"space": "gradient"}, "space='step' alone, got space='gradient'"),
    (lambda m: {**STEP, "protect": protecting(m)}, {"restore": 0.1}, "restore=0 alone, got restore=0.1"),
    (lambda m: {**STEP, "protect": protecting(m)}, {"history": 2}, "history=1 alone, got history=2"),
    (lambda m: {**STEP, "protect": protecting(m)}, {"scope": "global"}, "scope='tensor' alone, got scope='global'"),
    (lambda m: STEP, {"history": 1.5}, "history must be a whole number from 1, got 1.5"),
]


@pytest.mark.parametrize(("make", "bad", "message"), CONFLICTS)
def test_a_group_whose_settings_exclude_an_option_is_refused_when_given(make, bad, message):
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), **bad}]
    with pytest.raises(ValueError, match=message):
        MDGDOptimizer(torch.optim.SGD(groups, lr=0.1), **make(model))


@pytest.mark.parametrize(("make", "bad", "message"), CONFLICTS)
def test_a_group_whose_settings_exclude_an_option_is_refused_when_added(make, bad, message):
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), **make(model))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": model[2].parameters(), **bad})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("make", "bad", "message"), CONFLICTS)
def test_a_group_whose_settings_exclude_an_option_is_refused_when_loaded(make, bad, message):
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = MDGDOptimizer(torch.optim.SGD(groups, lr=0.1), **make(model))
    before, state_dict = optimizer.state_dict(), optimizer.state_dict()
    state_dict["param_groups"][1].update(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_settings_live_in_the_groups_and_a_group_may_have_its_own():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([{"params": [a]}, {"params": [b], "align": 0.25, "scope": "global"}], lr=0.1)
    optimizer = MDGDOptimizer(base, align=2.0, regularize=0.5)
    found = [(g["align"], g["regularize"], g["scope"], g["update"]) for g in optimizer.param_groups]
    assert found == [(2.0, 0.5, "tensor", "regularize"), (0.25, 0.5, "global", "regularize")]


def test_a_bad_setting_in_a_group_is_refused():
    base = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "align": -1.0}], lr=0.1)
    with pytest.raises(ValueError, match="align"):
        MDGDOptimizer(base)


def test_the_same_parameter_twice_is_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate"):
        base = torch.optim.SGD([p, p], lr=0.1)
    with pytest.raises(ValueError, match="more than once"):
        MDGDOptimizer(base)


def test_changing_a_setting_in_a_group_takes_effect():
    case = make_case([(5,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1))
    optimizer.param_groups[0]["align"] = 0.125
    optimizer.set_gradients(**case.gradients)
    optimizer.combine()
    assert_close([case.parameters[0].grad], expected(case.roles, case.parameters, align=0.125))


def test_add_param_group_takes_this_optimizers_settings_and_a_reference():
    case = make_case([(3,), (4,)], F64 * 2, 0)
    a, b = case.parameters
    optimizer = MDGDOptimizer(torch.optim.SGD([a], lr=0.1), align=0.5)
    with torch.no_grad():
        a.add_(1)
    now = b.detach().clone()
    optimizer.add_param_group({"params": iter([b]), "regularize": 2.0})
    with torch.no_grad():
        b.add_(1)
    with optimizer.reference():
        assert_same_bits([b], [now])
    optimizer.set_gradients(**case.gradients)
    optimizer.combine()
    wanted = [
        *expected([role[:1] for role in case.roles], [a], align=0.5),
        *expected([role[1:] for role in case.roles], [b], align=0.5, regularize=2.0),
    ]
    assert_close([a.grad, b.grad], wanted)


def test_add_param_group_with_a_bad_setting_adds_nothing():
    optimizer = sgd(network())
    with pytest.raises(ValueError, match="align"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "align": -1})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.parameters) == 4


USES = {
    "capture": lambda o: o.capture("task"),
    "reference": lambda o: o.reference().__enter__(),
    "required_roles": lambda o: o.required_roles,
    "set_gradients": lambda o: o.set_gradients(task=[None] * 5),
    "state_dict": lambda o: o.state_dict(),
    "step": lambda o: o.step(),
}


@pytest.mark.parametrize("use", USES)
def test_a_group_added_to_the_base_is_noticed(use):
    optimizer = sgd(network(), **TWO)
    optimizer.base.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="call add_param_group on the MDGDOptimizer, not on its base"):
        USES[use](optimizer)


@pytest.mark.parametrize("when", ["captured", "combined", "masked"])
def test_add_param_group_comes_before_captures_and_masks(when):
    case = make_case([(5,)], F64, 0)
    mask = TopK(0.5) if when == "masked" else None
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), update="project", space="step", mask=mask)
    optimizer.set_gradients(**case.gradients)
    if when == "combined":
        optimizer.combine()
    if when == "masked":
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"add_param_group: .*; add groups before"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_frozen_parameters_in_a_group_stay_as_they_are():
    model = network()
    model[2].weight.requires_grad_(False)
    start = model[2].weight.detach().clone()
    optimizer = sgd(model, **TWO)
    capture_both(model, optimizer)
    optimizer.step()
    assert model[2].weight.grad is None
    assert_same_bits([model[2].weight], [start])


def test_maximize_is_refused_in_gradient_space_alone():
    def base():
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, maximize=True)

    with pytest.raises(ValueError, match="maximize=True"):
        MDGDOptimizer(base())
    MDGDOptimizer(base(), update="project", space="step")

"""Settings in the parameter groups, and groups that come later."""

import math

import pytest
import torch
from torch import nn

from tests.networks import capture_both, network
from tests.properties import assert_close, assert_same_bits, expected
from tests.strategies import make_case
from torch_mdgd import MDGDOptimizer, TopK

F64 = (torch.float64,)
TWO = {"update": "project"}


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
        ({"space": "step"}, "space='step' works with update='project' alone"),
        ({"restore": 0.1}, "restore is a move in step space"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sgd(network(), **settings)


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

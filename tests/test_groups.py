"""What is refused, the rule's weights in the parameter groups, and groups that come later."""

import math

import pytest
import torch
from torch import nn

from tests.networks import capture_both, network
from tests.properties import assert_close, assert_same_bits, expected
from tests.strategies import make_case
from torch_mdgd import MDGD, DriftBudget, Given, MDGDOptimizer, Project, ProtectInputs, StepProject, TopK

F64 = (torch.float64,)


def sgd(model: nn.Module, rule=None, **settings) -> MDGDOptimizer:
    return MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MDGD(align=-1.0), "MDGD: align must be a finite number ≥ 0, got -1"),
        (lambda: MDGD(regularize=math.nan), "MDGD: regularize must be a finite number ≥ 0"),
        (lambda: MDGD(align="1"), "MDGD: align must be a finite number ≥ 0, got '1'"),
        (lambda: MDGD(align=True), "MDGD: align must be a finite number ≥ 0"),
        (lambda: Project(-0.5), "Project: align must be a finite number ≥ 0"),
        (lambda: StepProject(math.inf), "StepProject: restore must be a finite number ≥ 0"),
        (lambda: DriftBudget(MDGD(), -1), "DriftBudget: budget must be a finite number > 0, got -1"),
        (lambda: DriftBudget(MDGD(), "0.1"), "DriftBudget: budget must be a finite number > 0, got '0.1'"),
        (lambda: DriftBudget(MDGD(align=0), 0.1), "DriftBudget multiplies align: pass a rule with an align above 0"),
        (lambda: DriftBudget(StepProject(), 0.1), r"an align above 0, not StepProject\(restore=0\)"),
        (lambda: ProtectInputs(network(), 1.5, text_module=network()), "ProtectInputs: energy must lie in"),
        (lambda: ProtectInputs(network(), decay=1, text_module=network()), "ProtectInputs: decay must lie in"),
        (
            lambda: ProtectInputs(network(), refresh=0, text_module=network()),
            "refresh must be a whole number of at least 1",
        ),
    ],
)
def test_arguments_of_a_rule_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "project"}, r"rule must be a Rule such as MDGD\(\), or None, got 'project'"),
        ({"rule": MDGD}, "rule must be a Rule such as MDGD"),
        ({"mask": 0.1}, r"mask must be a Mask such as TopK\(0\.1\), or None, got 0\.1"),
        ({"mask": TopK}, "mask must be a Mask such as TopK"),
        ({"compact": 0.1, "mask": TopK(0.1)}, r"compact must be True or False, got 0\.1"),
        ({"align": 1.0}, "unexpected keyword argument 'align'"),
    ],
)
def test_arguments_of_another_kind_are_refused(settings, message):
    with pytest.raises(TypeError, match=message):
        sgd(network(), **settings)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rule": 1.0}, "rule must be a Rule"),
        ({"mask": Given([])}, "0 masks for 4 trained parameters"),
        ({"mask": TopK(0.5), "compact": 1}, "compact"),
        ({"rule": ProtectInputs(nn.Linear(1, 1), text_module=nn.Linear(1, 1))}, r"the weight of no nn\.Linear"),
    ],
)
def test_what_was_refused_leaves_no_settings_behind(bad, message):
    base = torch.optim.SGD(network().parameters(), lr=0.1)
    before = [set(group) for group in base.param_groups]
    with pytest.raises((TypeError, ValueError), match=message):
        MDGDOptimizer(base, **bad)
    assert [set(group) for group in base.param_groups] == before
    assert MDGDOptimizer(base).param_groups[0]["mdgd_align"] == 1.0


CONFLICTS = [
    (MDGD(), {"mdgd_align": -1}, "mdgd_align must be a finite number ≥ 0, got -1"),
    (
        MDGD(),
        {"mdgd_restore": 0.1},
        r"has 'mdgd_restore', and the rule MDGD\(align=1, regularize=1\) has no such weight",
    ),
    (StepProject(), {"mdgd_align": 1.0}, "has 'mdgd_align', and the rule StepProject"),
    (Project(), {"maximize": True}, "maximize=True would raise the visual loss as well"),
]


@pytest.mark.parametrize(("rule", "bad", "message"), CONFLICTS)
def test_a_group_that_does_not_suit_the_rule_is_refused_when_given(rule, bad, message):
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), **bad}]
    base = torch.optim.SGD(groups, lr=0.1)
    before = [set(group) for group in base.param_groups]
    with pytest.raises(ValueError, match=message):
        MDGDOptimizer(base, rule)
    assert [set(group) for group in base.param_groups] == before


@pytest.mark.parametrize(("rule", "bad", "message"), CONFLICTS)
def test_a_group_that_does_not_suit_the_rule_is_refused_when_added(rule, bad, message):
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), rule)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": model[2].parameters(), **bad})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.parameters) == 2


@pytest.mark.parametrize(("rule", "bad", "message"), [CONFLICTS[0], CONFLICTS[-1]])
def test_a_group_that_does_not_suit_the_rule_is_refused_when_loaded(rule, bad, message):
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = MDGDOptimizer(torch.optim.SGD(groups, lr=0.1), rule)
    before, state_dict = optimizer.state_dict(), optimizer.state_dict()
    state_dict["param_groups"][1].update(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_weights_live_in_the_groups_and_a_group_may_have_its_own():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([{"params": [a]}, {"params": [b], "mdgd_align": 0.25}], lr=0.1)
    optimizer = MDGDOptimizer(base, MDGD(2.0, 0.5))
    found = [tuple(g[f"mdgd_{name}"] for name in ("rule", "align", "regularize")) for g in optimizer.param_groups]
    assert found == [("MDGD", 2.0, 0.5), ("MDGD", 0.25, 0.5)]


def test_the_next_wrapping_keeps_nothing_of_the_last_one():
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    base = torch.optim.SGD([{"params": [a], "mdgd_restore": 0.5}, {"params": [b]}], lr=0.1)
    MDGDOptimizer(base, StepProject(0.25))
    with torch.no_grad():
        a.add_(1)
    optimizer = MDGDOptimizer(base, MDGD(10.0))
    for group in optimizer.param_groups:
        found = {key: value for key, value in group.items() if key.startswith("mdgd_")}
        assert found == {"mdgd_rule": "MDGD", "mdgd_align": 10.0, "mdgd_regularize": 1.0}
    with optimizer.reference():
        assert a.tolist() == [1.0] * 3


def test_the_same_parameter_twice_is_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate"):
        base = torch.optim.SGD([p, p], lr=0.1)
    with pytest.raises(ValueError, match="more than once"):
        MDGDOptimizer(base)


def test_changing_a_weight_in_a_group_takes_effect():
    case = make_case([(5,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1))
    optimizer.param_groups[0]["mdgd_align"] = 0.125
    optimizer.set_gradients(**case.gradients)
    optimizer.combine()
    assert_close([case.parameters[0].grad], expected(case.kinds, case.parameters, align=0.125))


def test_add_param_group_takes_the_rules_weights_and_a_reference():
    case = make_case([(3,), (4,)], F64 * 2, 0)
    a, b = case.parameters
    optimizer = MDGDOptimizer(torch.optim.SGD([a], lr=0.1), MDGD(0.5))
    with torch.no_grad():
        a.add_(1)
    now = b.detach().clone()
    optimizer.add_param_group({"params": iter([b]), "mdgd_regularize": 2.0})
    with torch.no_grad():
        b.add_(1)
    with optimizer.reference():
        assert_same_bits([b], [now])
    optimizer.set_gradients(**case.gradients)
    optimizer.combine()
    wanted = [
        *expected([kind[:1] for kind in case.kinds], [a], align=0.5),
        *expected([kind[1:] for kind in case.kinds], [b], align=0.5, regularize=2.0),
    ]
    assert_close([a.grad, b.grad], wanted)


USES = {
    "capture": lambda o: o.capture("task"),
    "reference": lambda o: o.reference().__enter__(),
    "needs": lambda o: o.needs(),
    "set_gradients": lambda o: o.set_gradients(task=[None] * 5),
    "state_dict": lambda o: o.state_dict(),
    "step": lambda o: o.step(),
}


@pytest.mark.parametrize("use", USES)
def test_a_group_added_to_the_base_is_noticed(use):
    optimizer = sgd(network())
    optimizer.base.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="call add_param_group on the MDGDOptimizer, not on its base"):
        USES[use](optimizer)


@pytest.mark.parametrize("when", ["captured", "combined", "masked"])
def test_add_param_group_comes_before_captures_and_masks(when):
    case = make_case([(5,)], F64, 0)
    mask = TopK(0.5) if when == "masked" else None
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), StepProject(), mask=mask)
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
    optimizer = sgd(model, Project())
    capture_both(model, optimizer)
    optimizer.step()
    assert model[2].weight.grad is None
    assert_same_bits([model[2].weight], [start])


def test_maximize_is_for_rules_that_correct_the_move():
    p = nn.Parameter(torch.zeros(2))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=1.0, maximize=True), StepProject())
    optimizer.set_gradients(task=[torch.tensor([1.0, 1.0])], visual=[torch.tensor([1.0, 0.0])])
    optimizer.step()
    # Along v the move would raise the visual loss.
    assert p.tolist() == [0.0, 1.0]

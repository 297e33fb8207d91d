"""What another wrapping has left in the groups of an optimizer is not taken for an argument."""

import pytest
import torch
from torch import nn

from tests.faults.registry import RULES, Branches
from torch_mdgd import MDGDOptimizer, Project, Random


def settings(group):
    return {key: value for key, value in group.items() if key.startswith("mdgd_")}


@pytest.mark.parametrize("new", RULES)
@pytest.mark.parametrize("old", ["MDGD", "StepProject", "Anchor"])
def test_a_second_wrapping_has_its_own_weights_and_reference(old, new):
    model = Branches()
    first = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), RULES[old](model))
    for group in first.param_groups:
        group.update(dict.fromkeys(settings(group).keys() - {"mdgd_rule"}, 9.0))
    with torch.no_grad():
        model.a.weight.add_(1)
    now = model.a.weight.detach().clone()
    second = MDGDOptimizer(first.base, RULES[new](model))
    fresh = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), RULES[new](model))
    assert [settings(group) for group in second.param_groups] == [settings(group) for group in fresh.param_groups]
    with second.reference():
        assert torch.equal(model.a.weight, now)


def test_an_argument_in_a_group_wins_over_the_rules():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = MDGDOptimizer(torch.optim.SGD([{"params": [p], "mdgd_align": 3.0}, {"params": [q]}]), Project(0.5))
    assert [group["mdgd_align"] for group in optimizer.param_groups] == [3.0, 0.5]


@pytest.mark.parametrize("compact", [False, True])
def test_state_inside_an_earlier_compact_mask_is_not_taken_for_state_of_whole_parameters(compact):
    p = nn.Parameter(torch.ones(8))
    first = MDGDOptimizer(torch.optim.AdamW([p], lr=0.5), Project(), mask=Random(0.5), compact=True)
    first.set_gradients(task=[torch.ones(8)], visual=[None])
    first.step()
    first.zero_grad()
    second = MDGDOptimizer(first.base, Project(), mask=Random(0.5, seed=1), compact=compact)
    before = p.detach().clone()
    second.set_gradients(task=[torch.ones(8)], visual=[None])
    second.step()
    assert int((p != before).sum()) == 4

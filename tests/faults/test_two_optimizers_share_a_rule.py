"""A rule with state belongs to one optimizer: what one makes of it would be the other's too."""

import pytest
import torch

from tests.passes import trainable
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD, Anchor, DriftBudget, MDGDOptimizer, Project, ProtectInputs, mdgd_backward

pytestmark = pytest.mark.filterwarnings("ignore:Anchor holds linear layers")
STATEFUL = {
    "DriftBudget": lambda model: DriftBudget(Project(), 0.1),
    "MDGD": lambda model: MDGD(1.0, 0, every=2),
    "ProtectInputs": ProtectInputs,
    "Anchor": lambda model: Anchor(model, rank=2),
}


def sgd(model):
    return torch.optim.SGD(trainable(model), lr=0.1)


@pytest.mark.parametrize("name", STATEFUL)
def test_it_is_refused_by_name_and_nothing_changes(name):
    model, other = llava(), llava()
    rule = STATEFUL[name](model)
    optimizer = MDGDOptimizer(sgd(model), rule)
    base = sgd(other)
    with pytest.raises(ValueError, match=f"{name} belongs to another optimizer already, .*: make a new one"):
        MDGDOptimizer(base, rule)
    assert not any(key.startswith("mdgd_") for key in base.param_groups[0])
    # The next task of the same optimizer, too, has a new rule.
    with pytest.raises(ValueError, match="also for the next task"):
        MDGDOptimizer(optimizer.base, rule)
    mdgd_backward(model, optimizer, llava_batch())
    optimizer.step()
    MDGDOptimizer(optimizer.base, STATEFUL[name](model))


def test_a_rule_inside_two_others_is_refused():
    inner = MDGD(1.0, 0, every=2)
    first, second = llava(), llava()
    MDGDOptimizer(sgd(first), Anchor(first, rule=inner))
    with pytest.raises(ValueError, match="MDGD belongs to another optimizer"):
        MDGDOptimizer(sgd(second), Anchor(second, rule=inner))


@pytest.mark.parametrize("rule", [MDGD(), Project()])
def test_a_rule_without_state_may_be_shared(rule):
    for _ in range(2):
        model = llava()
        optimizer = MDGDOptimizer(sgd(model), rule)
        mdgd_backward(model, optimizer, llava_batch())
        optimizer.step()

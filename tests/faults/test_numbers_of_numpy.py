"""Settings may be numpy's numbers, as they come out of a sweep, and mean what Python's mean."""

import copy

import numpy as np
import pytest
import torch

from tests.faults.registry import Branches, train
from tests.properties import assert_same_bits
from torch_mdgd import (
    MDGD,
    Anchor,
    DriftBudget,
    Magnitude,
    MDGDOptimizer,
    Project,
    ProtectInputs,
    Random,
    StepProject,
    TopK,
)

# Numbers that float16 holds.
NUMBERS = [np.float16, np.float32, np.float64]
WHOLE = [np.int8, np.int64, np.uint16]
RULES = {
    "MDGD": lambda model, real, whole: MDGD(real(0.5), real(1.25)),
    "MDGD, every": lambda model, real, whole: MDGD(real(0.5), whole(0), every=whole(2)),
    "Project": lambda model, real, whole: Project(real(0.5)),
    "StepProject": lambda model, real, whole: StepProject(real(0.125)),
    "ProtectInputs": lambda model, real, whole: ProtectInputs(
        model, real(0.5), decay=real(0.75), refresh=whole(2), text_module=model
    ),
    "DriftBudget": lambda model, real, whole: DriftBudget(MDGD(real(0.5), 0), real(0.125), measure_every=whole(2)),
    "Anchor": lambda model, real, whole: Anchor(
        model, real(0.25), rank=whole(2), tokens="image", warmup=whole(2), every=whole(2), text_module=model
    ),
}
MASKS = {
    "TopK": lambda real, whole: TopK(real(0.25), refresh=whole(2)),
    "Random": lambda real, whole: Random(real(0.25), seed=whole(3)),
    "Magnitude": lambda real, whole: Magnitude(real(0.25)),
}


def outcome(make_rule, make_mask, real, whole):
    model = Branches()
    base = torch.optim.SGD(model.parameters(), lr=0.125)
    optimizer = MDGDOptimizer(base, make_rule(model, real, whole), mask=make_mask(real, whole))
    train(model, optimizer, range(2))
    settings = [value for key, value in optimizer.param_groups[0].items() if key.startswith("mdgd_")]
    assert all(type(value) in (float, str) for value in settings)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(2, 4))
    return list(model.parameters())


@pytest.mark.parametrize("real", NUMBERS)
@pytest.mark.parametrize("rule", RULES)
def test_of_rules(rule, real):
    def nothing(*numbers):
        return None

    found = outcome(RULES[rule], nothing, real, np.int64)
    assert_same_bits(found, outcome(RULES[rule], nothing, float, int))


@pytest.mark.parametrize("real", NUMBERS)
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("mask", MASKS)
def test_of_masks(mask, whole, real):
    found = outcome(RULES["Project"], MASKS[mask], real, whole)
    assert_same_bits(found, outcome(RULES["Project"], MASKS[mask], float, int))


def test_in_a_group_and_by_a_schedule():
    outcomes = []
    for kind in (float, np.float32):
        model = Branches()
        groups = [{"params": list(model.parameters()), "mdgd_align": kind(0.25)}]
        optimizer = MDGDOptimizer(torch.optim.SGD(groups, lr=0.125), Project())
        train(model, optimizer, range(1))
        optimizer.param_groups[0]["mdgd_align"] = kind(0.75)
        train(model, optimizer, range(1, 2))
        outcomes.append(list(model.parameters()))
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("bad", [np.float32("nan"), np.float64("inf"), np.bool_(True), np.array([0.5]), np.int64(-1)])
def test_what_is_no_number_of_the_range_is_refused(bad):
    with pytest.raises(ValueError, match="must be a finite number ≥ 0"):
        Project(bad)

"""Histories of a compact run: of the selected numbers, which a new mask changes."""

import copy

import pytest

from tests.properties import assert_same_bits
from tests.strategies import make_case
from tests.test_history import F64, draw, sgd, stored
from torch_mdgd import Random, TopK


def test_a_new_mask_begins_a_new_history():
    case = make_case([(6, 5)], F64, 0)
    optimizer = sgd(case.parameters, history=3, mask=TopK(0.5, refresh=2), compact=True)
    lengths = []
    for seed in range(5):
        optimizer.set_gradients(**draw(case, seed))
        optimizer.step()
        optimizer.zero_grad()
        lengths.append(sum(float(row[0].norm()) > 0 for row in stored(optimizer, case.parameters)))
    assert lengths == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("when", ["wrapped", "combined", "chosen again"])
def test_compact_history_is_saved_and_loaded_between_a_mask_and_the_step_after_it(when):
    # As accelerate's prepare does, and a loop that does not make the step of a bad batch.
    mask = Random(0.5) if when == "wrapped" else TopK(0.5, refresh=2)
    outcomes = []
    for resume in (False, True):
        case = make_case([(6, 5), (3,)], F64 * 2, 0)
        optimizer = sgd(case.parameters, history=3, mask=mask, compact=True)
        for seed in range(2 if when == "chosen again" else 0):
            optimizer.set_gradients(**draw(case, seed))
            optimizer.step()
            optimizer.zero_grad()
        if when != "wrapped":
            optimizer.set_gradients(**draw(case, 7))
            optimizer.combine()
            optimizer.zero_grad()
        if resume:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = sgd(case.parameters, history=3, mask=mask, compact=True)
            optimizer.load_state_dict(state)
        for seed in (8, 9):
            optimizer.set_gradients(**draw(case, seed))
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(case.parameters)
    assert_same_bits(*outcomes)

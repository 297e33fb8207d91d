"""Frozen parameters take no part: nothing remembered is written to them, and none of their numbers counts.

That they do not move, by any rule and storage, is in the contract of rules.
"""

import copy

import pytest
import torch
from torch import nn

from torch_mdgd import Magnitude, MDGDOptimizer, Random, TopK
from torch_mdgd.rules.base import KINDS

MASKS = {"TopK": TopK(0.1), "Magnitude": Magnitude(0.1), "Random": Random(0.1)}


def frozen_and_trained():
    # The frozen ones are larger: by size or by gradient they would be chosen first.
    generator = torch.Generator().manual_seed(0)
    frozen = nn.Parameter(torch.randn(900, generator=generator), requires_grad=False)
    return frozen, nn.Parameter(0.1 * torch.randn(100, generator=generator))


def step(optimizer, count=100, seed=1):
    generator = torch.Generator().manual_seed(seed)
    optimizer.set_gradients(**{kind: [None, torch.randn(count, generator=generator)] for kind in optimizer.needs()})
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_a_tenth_is_of_the_trained_numbers(mask, compact):
    frozen, trained = frozen_and_trained()
    before = [frozen.detach().clone(), trained.detach().clone()]
    optimizer = MDGDOptimizer(torch.optim.SGD([frozen, trained], lr=0.5), mask=MASKS[mask], compact=compact)
    step(optimizer)
    assert torch.equal(frozen, before[0])
    assert int((trained != before[1]).sum()) == 10
    assert optimizer.diagnostics["kept_fraction"] == 0.1


@pytest.mark.parametrize("compact", [False, True])
def test_no_reference_of_a_frozen_parameter_is_kept(compact):
    frozen, trained = frozen_and_trained()
    optimizer = MDGDOptimizer(torch.optim.SGD([frozen, trained], lr=0.5), mask=Random(0.1), compact=compact)
    held = [x for x in optimizer._storage.reference if x is not None]
    assert sum(x.numel() for x in held) == (10 if compact else 100)
    assert optimizer.state_dict()["state"].keys() == {1}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_weights_of_four_bits_are_left_alone(mask, compact):
    _, trained = frozen_and_trained()
    packed = nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)
    optimizer = MDGDOptimizer(torch.optim.AdamW([packed, trained]), mask=MASKS[mask], compact=compact)
    for seed in (1, 2):
        step(optimizer, seed=seed)
        with optimizer.reference():
            assert packed.tolist() == list(range(8))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.set_reference()
    assert packed.tolist() == list(range(8))


def test_a_parameter_that_is_trained_later_has_its_value_then_as_reference():
    frozen, trained = frozen_and_trained()
    optimizer = MDGDOptimizer(torch.optim.SGD([frozen, trained], lr=0.5))
    step(optimizer)
    frozen.requires_grad_(True)
    with torch.no_grad():
        frozen.add_(1)
    now = frozen.detach().clone()
    optimizer.set_gradients(**{kind: [torch.ones(900), torch.ones(100)] for kind in KINDS})
    optimizer.step()
    assert not torch.equal(frozen, now)
    with optimizer.reference():
        assert torch.equal(frozen, now)


@pytest.mark.parametrize("compact", [False, True])
def test_a_parameter_that_is_trained_later_is_said_to_be_outside_the_mask(compact):
    frozen, trained = frozen_and_trained()
    optimizer = MDGDOptimizer(torch.optim.SGD([frozen, trained], lr=0.5), mask=Random(0.5), compact=compact)
    frozen.requires_grad_(True)
    before = frozen.detach().clone()
    optimizer.set_gradients(task=[torch.ones(900), torch.ones(100)], visual=[None, None])
    with pytest.warns(UserWarning, match="parameter 0 requires gradients only since the mask was chosen"):
        optimizer.step()
    assert torch.equal(frozen, before)

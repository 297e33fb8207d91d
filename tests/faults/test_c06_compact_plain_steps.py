"""With compact storage nothing may move before the mask is chosen: φ is held inside the mask alone."""

import copy

import pytest
import torch
from torch import nn

from torch_mdgd import MDGDOptimizer, Random, TopK
from torch_mdgd.delta import apply_delta, save_delta


def gradients(model, optimizer):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    return dict.fromkeys(optimizer.needs(), rows)


def plain_step(model, optimizer):
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_plain_step_before_the_mask_is_refused_and_changes_nothing():
    model = nn.Linear(4, 4)
    base = copy.deepcopy(model)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), mask=TopK(0.3), compact=True)
    with pytest.raises(RuntimeError, match=r"compact=True: a step before the mask is chosen .* capture the gradients"):
        plain_step(model, optimizer)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), base.parameters(), strict=True))
    optimizer.zero_grad()
    optimizer.set_gradients(**gradients(model, optimizer))
    optimizer.step()
    assert not torch.equal(model.weight, base.weight)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("first", ["plain", "zero", "none"])
def test_the_reference_is_what_was_wrapped_and_a_delta_fits_it(tmp_path, compact, first):
    model = nn.Linear(4, 4)
    base = copy.deepcopy(model)
    mask = Random(0.3) if compact and first == "plain" else TopK(0.3)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), mask=mask, compact=compact)
    if first == "plain":
        plain_step(model, optimizer)
    elif first == "zero":
        # As torch.distributed.checkpoint does, to have state to load into.
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.set_gradients(**gradients(model, optimizer))
    optimizer.step()
    optimizer.zero_grad()
    with optimizer.reference():
        assert torch.equal(model.weight, base.weight)
    save_delta(model, tmp_path / "d", optimizer)
    apply_delta(base, tmp_path / "d")
    assert torch.equal(model.weight, base.weight)

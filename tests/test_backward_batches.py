"""Steps of several micro-batches, some or all of them without pictures."""

import pytest
import torch

from tests.passes import FORMS, add, by_hand, by_hand_task, double_batch, drifted, grads, rule
from tests.properties import assert_close, assert_same_bits, expected
from tests.tiny_models import text_batch
from torch_mdgd import StepProject, TopK, mdgd_backward


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("name", [*FORMS, "step"])
def test_a_step_without_pictures_is_the_plain_one(name, batches):
    model, _, optimizer = drifted(rule=StepProject(restore=0.1) if name == "step" else rule(name))
    g = [None if x is None else x.clone() for x in by_hand_task(model, text_batch())]
    forwards = []
    model.register_forward_hook(lambda *args: forwards.append(None))
    for i in range(batches):
        state = torch.get_rng_state()
        mdgd_backward(model, optimizer, text_batch(), combine=i == batches - 1, weight=1 / batches)
        torch.set_rng_state(state)
    assert_same_bits(grads(optimizer), g)
    assert optimizer.diagnostics["visual_loss"] == 0
    if batches == 1:
        assert len(forwards) == 1
    before = [p.detach().clone() for p in optimizer.parameters]
    optimizer.step()
    twins = [torch.nn.Parameter(x) for x in before]
    for twin, x in zip(twins, g, strict=True):
        twin.grad = x
    torch.optim.SGD(twins, lr=0.1).step()
    assert_same_bits(optimizer.parameters, twins)


@pytest.mark.parametrize("compact", [False, True])
def test_a_mask_is_chosen_without_pictures_and_then_holds(compact):
    model, _, optimizer = drifted(mask=TopK(0.2), compact=compact)
    g = by_hand_task(model, text_batch())
    mdgd_backward(model, optimizer, text_batch())
    kept = [None if x is None else x != 0 for x in grads(optimizer)]
    assert sum(int(x.sum()) for x in kept if x is not None) == round(0.2 * sum(p.numel() for p in optimizer.parameters))
    optimizer.step()
    optimizer.zero_grad()
    g = by_hand_task(model, text_batch())
    mdgd_backward(model, optimizer, text_batch())
    present = [(x, y * m) for x, y, m in zip(grads(optimizer), g, kept, strict=True) if y is not None]
    assert_close(*zip(*present, strict=True))
    assert any(x.any() for x, _ in present)


@pytest.mark.parametrize("name", FORMS)
def test_micro_batches_add_up_before_the_update_is_formed(name):
    model, phi, optimizer = drifted(dropout=0.0, rule=rule(name))
    batches = [double_batch(seed=seed) for seed in (1, 2)] + [double_batch(make=text_batch)]
    # A quarter, so that scaling the float32 visual loss rounds nothing.
    total = [[None] * len(optimizer.parameters)] * 4
    for i, batch in enumerate(batches):
        if i < 2:
            roles = by_hand(model, phi, batch)
        else:
            nothing = [None] * len(optimizer.parameters)
            roles = [by_hand_task(model, batch), nothing, by_hand_task(phi, batch), nothing]
        total = [list(map(add, held, more)) for held, more in zip(total, roles, strict=True)]
        assert all(g is None for g in grads(optimizer))
        # Apart: norms sum in float32, so one backward pass of both losses rounds otherwise.
        mdgd_backward(model, optimizer, batch, weight=0.25, combine=i == 2, separate=True)
    total = [[None if x is None else x / 4 for x in role] for role in total]
    assert_close(grads(optimizer), expected(total, optimizer.parameters, **FORMS[name]), total)

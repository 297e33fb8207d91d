"""The passes of one step with what models and training loops add: checkpointing, tied weights, scalers, casts."""

import copy
from contextlib import nullcontext

import pytest
import torch

from tests.passes import by_hand, double_batch, drifted, grads, trainable
from tests.properties import assert_close, assert_same_bits, expected
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGDOptimizer, Project, TopK, mdgd_backward
from torch_mdgd.models.traces import Randomness


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    outcomes = []
    for checkpointed in (False, True):
        model, _, optimizer = drifted()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            # Reentrant checkpoints need an input with a gradient.
            model.enable_input_require_grads()
        torch.manual_seed(0)
        mdgd_backward(model, optimizer, double_batch())
        outcomes.append(grads(optimizer))
    assert_close(outcomes[1], outcomes[0])


def test_tied_embeddings():
    model = llava(tied=True).double()
    phi = copy.deepcopy(model)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02)
    batch = double_batch()
    roles = by_hand(model, phi, batch)
    mdgd_backward(model, optimizer, batch)
    assert_close(grads(optimizer), expected(roles, optimizer.parameters), roles)


def test_a_scaler_scales_all_four():
    model, phi, optimizer = drifted()
    batch = double_batch()
    roles = by_hand(model, phi, batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    mdgd_backward(model, optimizer, batch, scaler=scaler, weight=0.5)
    wanted = [0.5 * x for x in expected(roles, optimizer.parameters)]
    assert_close(grads(optimizer), [1024 * x for x in wanted])
    scaler.unscale_(optimizer)
    assert_close(grads(optimizer), wanted)


@pytest.mark.parametrize("settings", [{}, {"rule": Project()}, {"mask": TopK(0.3), "compact": True}])
def test_autocast_around_all_passes_sees_every_exchange(settings):
    outcomes = []
    for around in ("step", "forward"):
        model, batch = llava(0.2).train(), llava_batch()
        optimizer = MDGDOptimizer(torch.optim.SGD(trainable(model), lr=0.3), **settings)
        if around == "forward":
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        seen = []
        for _ in range(3):
            torch.manual_seed(0)
            # Not enabled=False: that would keep the casts of the forward passes inside, too.
            with torch.autocast("cpu", torch.bfloat16) if around == "step" else nullcontext():
                mdgd_backward(model, optimizer, batch, separate=True)
            seen.append(optimizer.diagnostics["visual_to_task"])
            optimizer.step()
            optimizer.zero_grad()
        assert seen[0] == 0
        assert 0 < seen[2] < float("inf")
        outcomes.append((seen, optimizer.parameters))
    assert outcomes[0][0] == outcomes[1][0]
    assert_same_bits(outcomes[0][1], outcomes[1][1])


def test_pure_bfloat16_parameters():
    model = llava().to(torch.bfloat16)
    batch = {k: x.bfloat16() if x.is_floating_point() else x for k, x in llava_batch().items()}
    phi, optimizer = copy.deepcopy(model), MDGDOptimizer(torch.optim.SGD(trainable(model), lr=0.1))
    with torch.no_grad():
        for p in optimizer.parameters:
            p.add_(0.05 * torch.randn_like(p))
    for p, q in zip(model.parameters(), phi.parameters(), strict=True):
        q.requires_grad_(p.requires_grad)
    roles = by_hand(model, phi, batch)
    mdgd_backward(model, optimizer, batch)
    assert all(x.dtype == torch.bfloat16 for x in grads(optimizer) if x is not None)
    assert_close(grads(optimizer), [x.bfloat16() for x in expected(roles, optimizer.parameters)], roles)


def test_the_random_state_of_every_device_of_a_model_is_rewound(monkeypatch):
    states = {"cuda:0": 3, "cuda:1": 5}

    class Generators:
        get_rng_state = staticmethod(lambda device: states[str(device)])
        set_rng_state = staticmethod(lambda state, device: states.update({str(device): state}))

    monkeypatch.setattr(torch, "get_device_module", lambda device: Generators)
    random = Randomness(map(torch.device, ("cpu", "meta", "cuda:0", "cuda:1")))
    states.update({"cuda:0": 7, "cuda:1": 7})
    random.rewind()
    assert states == {"cuda:0": 3, "cuda:1": 5}

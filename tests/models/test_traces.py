"""A pass at φ, or one to measure, leaves no trace: all is as after the one pass at θ."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD, MDGDOptimizer, Project, mdgd_backward
from torch_mdgd.models import traces
from torch_mdgd.models.traces import Traces, drawing_devices, keeping_buffers

RULES = {
    "published": MDGD(),
    "joint": MDGD(align=0, regularize=0),
    "project": Project(),
    "task alone": MDGD(align=0, regularize=0),
}


class Counting(nn.Module):
    """Keeps statistics in every way that modules have."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.norm = nn.BatchNorm1d(16)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.register_buffer("tokens_per_expert", torch.zeros(4))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("absent", None)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.tokens_per_expert[self.calls % 4] += x.shape[0]
        self.replaced = self.replaced + 1
        y = self.inner(x)
        return self.spectral(self.norm(y.flatten(0, -2)).view_as(y))


def counting():
    model = llava()
    model.model.multi_modal_projector = Counting(model.model.multi_modal_projector)
    # A first pass in training mode makes the spectral norm's vectors.
    return model.train()


def traces_of(model):
    return {**dict(model.named_buffers()), "calls": torch.tensor(model.model.multi_modal_projector.calls)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", RULES)
def test_a_pass_at_the_reference_or_an_extra_pass_leaves_no_traces_in_the_model(form, checkpointing):
    model = counting()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        projector = model.model.multi_modal_projector
        inner = projector.forward
        projector.forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), copy.deepcopy(RULES[form]))
    # The first step looks at everything, the next only at what has changed.
    for seed in range(3):
        batch = llava_batch(seed)
        if form == "task alone":
            batch = {k: x for k, x in batch.items() if k != "pixel_values"}
            batch["input_ids"] = batch["input_ids"].clamp(max=20)
        plain = copy.deepcopy(model)
        if checkpointing:
            own = plain.model.multi_modal_projector
            own.forward = lambda x, own=own: torch.utils.checkpoint.checkpoint(
                Counting.forward, own, x, use_reentrant=False
            )
        plain(**batch).loss.backward()
        optimizer.zero_grad()
        mdgd_backward(model, optimizer, batch)
        got, wanted = traces_of(model), traces_of(plain)
        assert got.keys() == wanted.keys()
        for key, x in wanted.items():
            assert torch.equal(got[key], x), key
        optimizer.step()


class Drawing(nn.Module):
    """Draws from every generator, and makes noise of it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        return self.inner(x) * (1 + noise)


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("form", ["published", "joint", "project"])
def test_random_numbers_of_torch_python_and_numpy_are_those_of_one_pass(form):
    model = llava()
    model.model.multi_modal_projector = Drawing(model.model.multi_modal_projector)
    plain = copy.deepcopy(model)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), copy.deepcopy(RULES[form]))

    def seeded():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    seeded()
    wanted_loss = plain(**llava_batch()).loss
    wanted = drawn()
    seeded()
    loss = mdgd_backward(model, optimizer, llava_batch())
    assert drawn() == wanted
    assert_same_bits([loss], [wanted_loss.detach()])
    # Nothing has moved, so noise of another pass would be the only drift.
    assert optimizer.diagnostics["visual_loss"] == 0


def test_only_what_was_seen_to_change_is_copied_after_the_first_look(monkeypatch):
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.zeros(1 << 19))
            self.register_buffer("count", torch.zeros(()))

        def forward(self):
            self.count += 1

    model, copied = nn.Sequential(Quantised(), nn.BatchNorm1d(2)), []
    original = traces._copy
    monkeypatch.setattr(traces, "_copy", lambda x: copied.append(x.numel()) or original(x))

    def look(pictures=True):
        copied.clear()
        before = {key: x.clone() for key, x in model.state_dict().items()}
        with keeping_buffers(model):
            model[0]()
            if pictures:
                model[1](torch.randn(3, 2))
        for key, x in model.state_dict().items():
            assert torch.equal(x, before[key]), key
        return sorted(copied)

    # What was not run is not known.
    assert look(pictures=False) == [1, 1, 2, 2, 1 << 19]
    assert look() == [1, 1, 2, 2]
    assert look() == [1, 1, 2, 2]
    model.eval()
    # In another mode other things change.
    assert len(look()) == 5
    assert look() == [1, 1, 2, 2]


def test_a_graph_that_is_held_outlives_what_is_undone():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    y = model(torch.randn(3, 2)).square().sum()
    with Traces(model).aside(), torch.no_grad():
        model(torch.randn(3, 2))
    y.backward()
    assert model[0].weight.grad.isfinite().all()


def test_devices_beside_those_of_the_parameters_are_drawn_from_too(monkeypatch):
    class Module:
        device_count = staticmethod(lambda: 3)

    monkeypatch.setattr(torch, "get_device_module", lambda kind: Module)
    found = drawing_devices({torch.device("cpu"), torch.device("cuda", 1)})
    assert [str(device) for device in found] == ["cpu", "cuda:0", "cuda:1", "cuda:2"]

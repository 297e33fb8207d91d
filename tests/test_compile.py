"""torch.compile of the model, of the wrapped optimizer's step and of the wrapper's, against the same without it."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests import networks
from tests.networks import capture_needed
from tests.properties import assert_close, assert_near
from torch_mdgd import MDGDOptimizer, StepProject, TopK, VisualTap, mdgd_backward

FORMS = {
    "published": {},
    "step": {"rule": StepProject(0.1)},
    "masked": {"mask": TopK(0.3)},
    "compact": {"mask": TopK(0.3), "compact": True},
}
network = partial(networks.network, torch.float32)


@pytest.fixture(autouse=True)
def _nothing_compiled_before_or_after():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@dataclass
class Output:
    loss: Tensor


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).sin()
        return x


class Toy(nn.Module):
    """Small enough to be compiled in one graph, tap included."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inputs, self.body, self.head = nn.Linear(3, 4), Decoder(), nn.Linear(4, 1)

    def forward(self, x, marks):
        return Output(self.head(self.body(self.inputs(x))).square().mean())


def toy_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    marks = torch.tensor([[True, True, False], [False, True, True]])
    return {"x": torch.randn(2, 3, 3, generator=generator), "marks": marks}


def trained(compile_, layers=-1, before=False):
    """Three steps of the toy, and for each the task loss that a call without the tap gives afterwards."""
    model = Toy()
    called = compile_(model)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    tap = VisualTap(model.body, lambda batch: batch["marks"], layers)
    if before:
        called(**toy_batch(9))
    seen = []
    for seed in range(3):
        mdgd_backward(called, optimizer, toy_batch(seed), tap=tap)
        seen += [p.grad.clone() for p in optimizer.parameters]
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.diagnostics["visual_to_task"] > 0
    return seen


def around(model, backend="aot_eager"):
    return torch.compile(model, backend=backend)


def in_place(model):
    model.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize("layers", [-1, (0, 1, -1)])
@pytest.mark.parametrize("compile_", [around, in_place])
def test_gradients_of_a_compiled_model_are_those_of_the_model(compile_, layers):
    assert_near(trained(compile_, layers), trained(lambda model: model, layers))


def test_a_compiled_model_that_ran_before_says_what_to_do_and_then_works():
    with pytest.raises(RuntimeError, match="skip_nnmodule_hook_guards = False before its first call"):
        trained(around, before=True)
    torch.compiler.reset()
    # pytest's monkeypatch would leave no such setting behind.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        assert_near(trained(around, before=True), trained(lambda model: model))


def stepped(form, change=lambda optimizer: None, base=torch.optim.AdamW, base_change=lambda optimizer: None):
    model = network()
    plain = base(model.parameters(), lr=0.1)
    base_change(plain)
    optimizer = MDGDOptimizer(plain, **form)
    change(optimizer)
    for _ in range(3):
        capture_needed(model, optimizer)
        optimizer.combine()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


@pytest.mark.parametrize(
    ("name", "verbs"),
    [*((name, ["combine", "step"]) for name in FORMS), ("step", ["step"]), ("step", ["combine"])],
)
def test_compiling_what_the_wrapper_does_changes_nothing(name, verbs):
    def compiled(optimizer):
        for verb in verbs:
            setattr(optimizer, verb, torch.compile(getattr(optimizer, verb), backend="eager"))

    assert_near(stepped(FORMS[name], compiled), stepped(FORMS[name]))


@pytest.mark.parametrize("name", FORMS)
def test_the_wrapped_optimizer_may_have_a_compiled_step(name):
    def compiled(optimizer):
        optimizer.step = torch.compile(optimizer.step, backend="eager")

    wanted = [p.detach().double() for p in stepped(FORMS[name], base=torch.optim.SGD)]
    assert_close(stepped(FORMS[name], base=torch.optim.SGD, base_change=compiled), wanted)

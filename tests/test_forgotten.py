"""What is easily forgotten, and that a user then reads what to do."""

import types
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.networks import capture_both, losses, network
from tests.properties import assert_same_bits
from tests.tiny_models import IMAGE, llava, llava_batch, text_batch
from torch_mdgd import MDGDOptimizer, Project, VisualTap, mdgd_backward
from torch_mdgd.backward import find_optimizer


def sgd(model, rule=None):
    return MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule)


def test_a_tap_that_does_not_know_the_models_image_token():
    model = llava()
    optimizer = sgd(model)
    tap = VisualTap(VisualTap.for_model(model).text_module, lambda batch: batch["input_ids"] == IMAGE + 1)
    with pytest.warns(UserWarning, match=r"the batch holds pixel_values, but the tap marks no image token.*tap\.mask"):
        mdgd_backward(model, optimizer, llava_batch(), tap=tap)


@pytest.mark.parametrize("pixels", ["absent", None, torch.zeros(0, 3, 8, 8)])
def test_a_batch_of_text_needs_no_warning(pixels):
    model = llava()
    batch = text_batch() if pixels == "absent" else {**text_batch(), "pixel_values": None}
    tap = VisualTap.for_model(model)

    def loss(inputs):
        return model(**{k: x for k, x in inputs.items() if k != "pixel_values"}).loss

    if isinstance(pixels, torch.Tensor):
        batch["pixel_values"] = pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mdgd_backward(model, sgd(model), batch, tap=tap, loss=loss)


def test_nothing_to_train():
    model = llava()
    optimizer = sgd(model)
    model.requires_grad_(False)
    with pytest.raises(
        RuntimeError, match=r"no trainable parameter influences .* image tokens: train something before"
    ):
        mdgd_backward(model, optimizer, llava_batch())
    with pytest.raises(RuntimeError, match="nothing that the task loss depends on requires gradients: is a parameter"):
        mdgd_backward(model, optimizer, text_batch())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_that_reentrant_checkpoints_need_an_input_with_a_gradient():
    class Checkpointed(nn.Module):
        reentrant = True

        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x, marks):
            z = checkpoint(self.body, x, use_reentrant=self.reentrant)
            return types.SimpleNamespace(loss=self.head(z).square().mean())

    model = Checkpointed()
    optimizer = sgd(model)
    tap = VisualTap(model.body, lambda batch: batch["marks"])
    batch = {"x": torch.randn(2, 5, 3), "marks": torch.ones(2, 5, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match="with gradient checkpointing pass use_reentrant=False"):
        mdgd_backward(model, optimizer, batch, tap=tap)
    model.reentrant = False
    mdgd_backward(model, optimizer, batch, tap=tap)
    assert all(p.grad is not None for p in model.parameters())


def test_to_freeze_what_the_optimizer_does_not_hold():
    model = llava()
    optimizer = sgd(model.model.language_model)
    with pytest.warns(
        UserWarning, match=r"require gradients and are not the optimizer's, beginning with .*Freeze them"
    ):
        mdgd_backward(model, optimizer, llava_batch())
    optimizer.zero_grad()
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mdgd_backward(model, optimizer, llava_batch())


def test_an_optimizer_over_other_parameters():
    model, other = llava(), nn.Linear(2, 2)
    own = model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    with pytest.raises(RuntimeError, match="Is anything that the optimizer holds used in this loss"):
        mdgd_backward(model, sgd(other), llava_batch())
    # Another optimizer's is as it was.
    assert model.lm_head.weight.grad is own
    assert bool((own == 1).all())


@pytest.mark.parametrize("kind", ["task", "visual"])
@pytest.mark.parametrize("verb", ["combine", "step"])
def test_a_kind_that_was_not_captured(verb, kind):
    model = network()
    optimizer = sgd(model, Project())
    other = {"task": 0, "visual": 1}[kind]
    with optimizer.capture("visual" if kind == "task" else "task"):
        losses(model)[other].backward()
    with pytest.raises(RuntimeError, match=rf"needs the {kind} gradient, not captured: run .* in capture\('{kind}'\)"):
        getattr(optimizer, verb)()


def test_gradients_at_the_reference():
    model = network()
    optimizer = sgd(model)
    capture_both(model, optimizer)
    with pytest.raises(
        RuntimeError, match=r"inside reference\(\); rules\.Project\(\) and MDGD\(regularize=0\) need no"
    ):
        optimizer.step()


def test_the_scaler_of_a_loop_with_one():
    # torch's own words, before anything is stepped.
    model = llava()
    optimizer = sgd(model)
    now = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    mdgd_backward(model, optimizer, llava_batch())
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.step(optimizer)
    assert_same_bits(list(model.parameters()), now)


def test_the_optimizer_around_the_optimizer():
    model = llava()
    with pytest.raises(TypeError, match="optimizer must be an MDGDOptimizer, got SGD"):
        mdgd_backward(model, sgd(model).base, llava_batch())


def test_that_accelerate_had_prepared_it():
    accelerate = pytest.importorskip("accelerate")
    from tests import accelerate_state

    outcomes = []
    for times in (0, 1, 2):
        accelerate_state.reset()
        accelerator = accelerate.Accelerator(cpu=True)
        model = llava()
        prepared = optimizer = sgd(model)
        for _ in range(times):
            prepared = accelerator.prepare(prepared)
        assert find_optimizer(prepared) is optimizer
        for seed in range(2):
            mdgd_backward(model, prepared, llava_batch(seed))
            prepared.step()
            prepared.zero_grad()
        outcomes.append(list(model.parameters()))
    accelerate_state.reset()
    assert_same_bits(outcomes[1], outcomes[0])
    assert_same_bits(outcomes[2], outcomes[0])


def test_that_other_parameters_were_trained_when_it_was_saved():
    whole, part = network(), network()
    saved = sgd(whole).state_dict()
    optimizer = MDGDOptimizer(torch.optim.SGD(part[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="for 4 parameters, this optimizer has 2: build it over the same trainable"):
        optimizer.load_state_dict(saved)

"""The visual loss for those who own no optimizer: the same numbers as the wrapper's."""

import copy
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch, text_batch
from torch_mdgd import MDGD, Anchor, MDGDOptimizer, connector, freeze_all_but, last_decoder_layers, mdgd_backward
from torch_mdgd.loss import Reference, VisualLoss, visual_loss


def full():
    model = llava(dropout=0.1).train()
    return model, freeze_all_but(model, [connector(model), *last_decoder_layers(model, 1)])


def lora():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = get_peft_model(llava().requires_grad_(False), config).train()
    return model, [p for p in model.parameters() if p.requires_grad]


def watched(model, batch, reference):
    """The same by hooks on the model's own pass."""
    visual = VisualLoss(model, reference=reference)
    output = model(**batch)
    visual.remove()
    return output, visual.take()


def move(parameters):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("make", [full, lora])
@pytest.mark.filterwarnings("ignore:parameter . has changed")
def test_its_gradient_is_the_wrappers(make):
    model, parameters = make()
    reference, optimizer = Reference(model), MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1), MDGD(2.0, 0))
    assert reference.off == (make is lora)
    second = copy.deepcopy(model)
    move(parameters)
    state = torch.get_rng_state()
    mdgd_backward(model, optimizer, llava_batch())
    wanted = [p.grad.clone() for p in parameters]
    for where, way in ((reference, visual_loss), (optimizer, visual_loss), (second, visual_loss), (reference, watched)):
        optimizer.zero_grad()
        torch.set_rng_state(state)
        output, visual = way(model, llava_batch(), reference=where)
        (output.loss + 2.0 * visual).backward()
        scale = max(float(x.abs().max()) for x in wanted)
        for p, x in zip(parameters, wanted, strict=True):
            assert (p.grad - x).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("make", [full, lora])
def test_at_the_reference_it_is_zero_and_the_weights_come_back(make):
    model, parameters = make()
    reference = Reference(model)
    before = [p.detach().clone() for p in parameters]
    _, visual = visual_loss(model, llava_batch(), reference=reference)
    assert visual == 0
    assert_same_bits(parameters, before)


def hooks(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_only_passes_in_training_are_watched_and_a_loss_is_taken_once():
    model, parameters = full()
    with torch.no_grad():
        # transformers leaves hooks of its own.
        model(**llava_batch())
    before = hooks(model)
    visual = VisualLoss(model)
    with torch.no_grad():
        model(**llava_batch())
    assert visual.take() == 0, "an evaluation by the same loss function"
    model.eval()(**llava_batch())
    with pytest.raises(RuntimeError, match="was not run in training"):
        visual.take()
    move(parameters)
    model.train()
    model(**llava_batch())
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**{**llava_batch(), "pixel_values": llava_batch()["pixel_values"][:1]})
    with pytest.raises(RuntimeError, match="was not run in training"):
        # That of the pass before is gone.
        visual.take()
    model(**llava_batch())
    with torch.no_grad():
        model(**llava_batch())
    assert visual.take() > 0, "which is not forgotten for a pass without gradients"
    model(**llava_batch())
    visual.take()
    with pytest.raises(RuntimeError, match="was not run in training"):
        visual.take()
    visual.remove()
    assert hooks(model) == before


class Remembering(nn.Module):
    """Draws from every generator, counts its passes and follows statistics."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.norm, self.calls = inner, nn.BatchNorm1d(16), 0
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.rows += len(x)
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        y = self.inner(x) * (1 + noise)
        return self.norm(y.flatten(0, -2)).view_as(y)


def remembering():
    model = llava(dropout=0.1).train()
    model.model.multi_modal_projector = Remembering(model.model.multi_modal_projector)
    return model


def seeded(call):
    """What a call returns, and the next number of each generator after it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return call(), (random.random(), float(np.random.rand()), float(torch.rand(())))


@pytest.mark.parametrize("training", [True, False])
def test_a_second_model_as_the_reference_is_left_as_it_was(training):
    model, plain = remembering(), remembering()
    second = copy.deepcopy(model).train(training)
    buffers = {name: x.clone() for name, x in second.named_buffers()}
    modes = [module.training for module in second.modules()]
    (_, visual), drawn = seeded(lambda: visual_loss(model, llava_batch(), reference=second))
    visual.backward()
    assert {name for name, x in second.named_buffers() if not torch.equal(x, buffers[name])} == set()
    assert second.model.multi_modal_projector.calls == 0
    assert [module.training for module in second.modules()] == modes
    assert all(p.grad is None for p in second.parameters())
    # The model itself has run once, with the random numbers of one pass; so has the second, with the same.
    assert drawn == seeded(lambda: plain(**llava_batch()))[1]
    assert model.model.multi_modal_projector.calls == 1
    for (name, x), y in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0, msg=name)
    assert (visual == 0) == training


def test_adapters_that_are_frozen_in_part_stay_so():
    model, _ = lora()
    frozen = [p for name, p in model.named_parameters() if ".lora_A." in name]
    for p in frozen:
        p.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    reference = Reference(model)
    assert reference.off
    visual_loss(model, llava_batch(), reference=reference)
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_text_alone_has_no_visual_loss():
    model, _ = full()
    output, visual = visual_loss(model, text_batch(), reference=Reference(model))
    assert visual == 0
    assert output.loss > 0


def test_adapters_that_have_moved_are_copied():
    model, parameters = lora()
    move(parameters)
    before = [p.detach().clone() for p in parameters]
    reference = Reference(model)
    assert not reference.off
    move(parameters)
    with reference():
        assert_same_bits(parameters, before)


def test_a_parameter_that_is_trained_later_has_a_reference_too():
    model, _ = full()
    freeze_all_but(model, last_decoder_layers(model, 1))
    reference, second = Reference(model), copy.deepcopy(model)
    unfrozen = connector(model).requires_grad_(True)
    assert visual_loss(model, llava_batch(), reference=reference)[1] == 0
    move(unfrozen.parameters())
    state = torch.get_rng_state()
    _, wanted = visual_loss(model, llava_batch(), reference=second)
    torch.set_rng_state(state)
    _, visual = visual_loss(model, llava_batch(), reference=reference)
    assert wanted > 0
    assert_same_bits([visual], [wanted])


def test_a_parameter_that_came_into_the_model_later_has_none():
    model, _ = full()
    reference = Reference(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"lora_A.default.weight is trained, and was no parameter of the model"):
        visual_loss(adapted, llava_batch(), reference=reference)


def test_a_model_without_trained_parameters():
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        Reference(llava().requires_grad_(False))


def test_the_anchors_loss_holds_no_copy_of_adapters_that_begin_as_nothing():
    model, parameters = lora()
    anchor = Anchor(model).hold()
    anchor.calibrate([llava_batch()])
    own = {p.data_ptr() for p in parameters}
    assert sum(x.untyped_storage().nbytes() for x in anchor._phi if x.data_ptr() not in own) <= 4 * len(parameters)
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1), Anchor(model))
    optimizer.rule.calibrate([llava_batch()])
    optimizer.set_reference()
    move(parameters)
    optimizer.set_gradients(task=[torch.zeros_like(p) for p in parameters])
    optimizer.combine()
    wanted = [p.grad.clone() for p in parameters]
    optimizer.zero_grad()
    anchor.loss().backward()
    scale = max(float(x.abs().max()) for x in wanted)
    for p, x in zip(parameters, wanted, strict=True):
        assert (p.grad - x).abs().max() <= 1e-5 * scale

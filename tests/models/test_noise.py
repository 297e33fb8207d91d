"""Equal weights give a visual gradient of exactly zero, also where a pass without gradients takes another kernel."""

import copy

import pytest
import torch
from torch import nn

from tests.properties import assert_near
from tests.tiny_models import llava, llava_batch, text_batch
from torch_mdgd import MDGD, MDGDOptimizer, Project, VisualTap, mdgd_backward
from torch_mdgd.loss import Reference, visual_loss
from torch_mdgd.models.noise import without_noise
from torch_mdgd.models.passes import known_of

RULES = {"published": MDGD, "joint": lambda: MDGD(regularize=0), "project": Project}


class Rounding(nn.Module):
    """Another kernel without gradients: the same numbers but for their last digits."""

    def __init__(self, inner, error=3e-7):
        super().__init__()
        self.inner, self.error = inner, error

    def forward(self, x):
        y = self.inner(x)
        return y if torch.is_grad_enabled() else y * (1 + self.error)


def rounding(error=3e-7):
    model = llava()
    model.model.multi_modal_projector = Rounding(model.model.multi_modal_projector, error)
    return model


def visual_gradients(optimizer, model, batch):
    """What was captured as visual gradients, before they are combined."""
    mdgd_backward(model, optimizer, batch, combine=False, separate=True)
    kinds = [kind for kind in optimizer.captured if "visual" in kind]
    return [x for kind in kinds for x in optimizer.captured[kind] if x is not None]


@pytest.mark.parametrize("error", [3e-7, 1e-2])
@pytest.mark.parametrize("rule", ["published", "project"])
def test_at_the_first_step_the_visual_gradient_is_exactly_zero(rule, error):
    model = rounding(error)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), RULES[rule]())
    # The first step finds it out, the next ones know.
    for _ in range(2):
        found = visual_gradients(optimizer, model, llava_batch())
        assert found
        assert not any(x.any() for x in found)
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_transformer_encoder_in_evaluation_mode():
    class Projector(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2).eval()

        def forward(self, x):
            return self.encoder(self.inner(x))

    model = llava()
    model.model.multi_modal_projector = Projector(model.model.multi_modal_projector)
    model.train()
    model.model.multi_modal_projector.eval()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert not any(x.any() for x in visual_gradients(optimizer, model, llava_batch()))


@pytest.mark.filterwarnings("ignore:.*has changed since the optimizer was wrapped")
@pytest.mark.parametrize("rule", RULES)
def test_drift_is_that_of_a_model_without_another_kernel(rule):
    outcomes = []
    for make in (rounding, llava):
        model = make()
        optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), RULES[rule]())
        for _ in range(3):
            optimizer.zero_grad()
            mdgd_backward(model, optimizer, llava_batch())
            optimizer.step()
        outcomes.append([p.detach() for p in model.parameters()])
    # At the first step the kernels are found out, from the second on z(φ) is of a pass with gradients.
    assert_near(*outcomes)


@pytest.mark.parametrize("rule", RULES)
def test_it_costs_nothing_where_it_is_not_needed(rule):
    model, runs = llava(), []
    model.model.language_model.register_forward_hook(lambda *args: runs.append(torch.is_grad_enabled()))
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), RULES[rule]())
    for _ in range(2):
        runs.clear()
        mdgd_backward(model, optimizer, llava_batch())
        optimizer.step()
        optimizer.zero_grad()
        assert runs == ([False, True, True] if rule == "published" else [False, True])


def test_a_second_kernel_costs_one_pass_once():
    model, runs = rounding(), []
    model.model.language_model.register_forward_hook(lambda *args: runs.append(torch.is_grad_enabled()))
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Project())
    for wanted in ([False, True, False], [True, True]):
        runs.clear()
        mdgd_backward(model, optimizer, llava_batch())
        optimizer.step()
        optimizer.zero_grad()
        assert runs == wanted


def test_the_plain_loss_is_zero_at_the_reference_too():
    model = rounding()
    reference = Reference(model)
    # From which nothing is learned of the kernels.
    visual_loss(model, text_batch(), reference=reference)
    for _ in range(2):
        loss = visual_loss(model, llava_batch(), reference=reference)[1]
        assert loss == 0


@pytest.mark.parametrize("drift", [0.0, 1e-5, 0.5])
def test_the_drift_of_passes_without_gradients_is_what_is_left(drift):
    """What a run that is resumed meets: its weights have moved, and nothing is known yet."""
    module = nn.Identity()
    torch.manual_seed(0)
    z = torch.randn(4, 3)
    noisy = z + 1e-6
    direction = torch.randn(4, 3).sign()
    fixed = without_noise(z, noisy - drift * direction, lambda: noisy, module)
    if drift < 0.1:
        torch.testing.assert_close(z - fixed, drift * direction, atol=2e-7, rtol=0)
        assert known_of(module).other_kernels
    else:
        # Beside such a drift rounding is nothing.
        assert known_of(module).other_kernels is False
    if not drift:
        assert torch.equal(fixed, z)


def test_knowledge_goes_with_its_model():
    tap = VisualTap.for_model(llava())
    known_of(tap.text_module).other_kernels = True
    assert known_of(copy.deepcopy(tap.text_module)).other_kernels is None

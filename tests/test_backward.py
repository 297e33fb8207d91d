"""The passes of one step, against a version written by hand with a second model as the reference."""

import copy
import types

import pytest
import torch
from torch import nn

from tests.passes import FORMS, by_hand, double_batch, drifted, grads, rule
from tests.properties import assert_close, assert_same_bits, expected
from tests.tiny_models import llava, llava_batch, qwen, qwen_batch
from torch_mdgd import MDGDOptimizer, TopK, VisualTap, mdgd_backward, visual_alignment_loss


@pytest.mark.parametrize("kind", ["l1", "mse"])
@pytest.mark.parametrize("name", FORMS)
def test_equals_the_version_by_hand_with_dropout(name, kind):
    model, phi, optimizer = drifted(rule=rule(name))
    batch = double_batch()
    roles = by_hand(model, phi, batch, kind)
    # One backward pass of both losses rounds otherwise, since norms sum in float32.
    loss = mdgd_backward(model, optimizer, batch, alignment=kind, separate=True)
    assert_close(grads(optimizer), expected(roles, optimizer.parameters, **FORMS[name]), roles)
    assert max(float(x.abs().max()) for x in roles[1] if x is not None) > 1e-4
    assert not loss.requires_grad


def test_equals_the_version_by_hand_under_a_mask():
    model, phi, optimizer = drifted(mask=TopK(0.2))
    for _ in range(2):
        batch = double_batch()
        roles = by_hand(model, phi, batch)
        mdgd_backward(model, optimizer, batch, separate=True)
        masks = [entry["mdgd_mask"] for entry in optimizer.state_dict()["state"].values()]
        assert_close(grads(optimizer), expected(roles, optimizer.parameters, masks=masks), roles)
        optimizer.step()
        optimizer.zero_grad()


def test_returns_the_task_loss_and_records_the_visual_loss():
    model, phi, optimizer = drifted(dropout=0.0)
    batch = double_batch()
    z, z_phi = (VisualTap.for_model(m)(m, batch)[1] for m in (model, phi))
    loss = mdgd_backward(model, optimizer, batch, weight=0.25)
    assert loss.item() == model(**batch).loss.item()
    # The pass at φ has no graph here.
    assert optimizer.diagnostics["visual_loss"] == pytest.approx(visual_alignment_loss(z, z_phi).item(), rel=1e-6)


@pytest.mark.parametrize("make", [(lambda: llava(0.2), llava_batch), (qwen, qwen_batch)], ids=["llava", "qwen2-vl"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", ["published", "project"])
def test_fact_1_the_first_step_has_no_drift_at_all_with_dropout_on(form, padded, make):
    model, batch = make[0]().train(), make[1]()
    batch["attention_mask"][0, 0] = 0 if padded else 1
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule(form))
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    twin(**batch).loss.backward()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    mdgd_backward(model, optimizer, batch)
    assert optimizer.diagnostics["visual_to_task"] == 0
    factor = 2 if form == "published" else 1
    wanted = [None if p.grad is None else factor * p.grad for p in twin.parameters()]
    assert_same_bits(grads(optimizer), wanted)
    # The next step draws other numbers, those that it would have drawn without the extra passes.
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(
    ("form", "forwards", "backwards", "heads"),
    [("published", 3, 4, 2), ("unregularized", 2, 1, 1), ("project", 2, 2, 1)],
)
def test_number_of_passes(form, forwards, backwards, heads):
    model, _, optimizer = drifted(rule=rule(form))
    seen = []
    model.model.language_model.register_forward_hook(lambda *args: seen.append("forward"))
    optimizer.parameters[-1].register_post_accumulate_grad_hook(lambda p: seen.append("head"))
    optimizer.parameters[0].register_post_accumulate_grad_hook(lambda p: seen.append("backward"))
    mdgd_backward(model, optimizer, double_batch())
    assert seen.count("forward") == forwards
    assert seen.count("backward") == backwards
    # The head is not on the way to z.
    assert seen.count("head") == heads


@pytest.mark.parametrize("training", [True, False])
def test_every_module_stays_in_its_mode(training):
    model, _, optimizer = drifted()
    model.train(training)
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    during = []
    model.register_forward_pre_hook(lambda module, args: during.append([m.training for m in model.modules()]))
    mdgd_backward(model, optimizer, double_batch())
    assert during == [modes] * 3
    assert [module.training for module in model.modules()] == modes


def test_a_loss_of_ones_own_and_weights_for_each():
    model, phi, optimizer = drifted(dropout=0.0)
    batch = double_batch()
    g, v, g0, v0 = by_hand(model, phi, batch)
    weighted = zip((g, v, g0, v0), (4, 0.5, 4, 0.5), strict=True)
    roles = [[None if x is None else w * x for x in role] for role, w in weighted]

    def loss(inputs):
        return 8 * model(**inputs).loss  # a power of two, since losses are float32

    mdgd_backward(model, optimizer, batch, loss=loss, weight=0.5)
    assert_close(grads(optimizer), expected(roles, optimizer.parameters), roles)


def test_a_tap_and_model_of_ones_own():
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

        def forward(self, x, marks):
            return types.SimpleNamespace(loss=self.head(self.body(x)).square().mean())

    model = Toy()
    phi = copy.deepcopy(model)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    batch = {"x": torch.randn(2, 5, 3, dtype=torch.float64), "marks": torch.ones(2, 5, dtype=torch.bool)}
    roles = []
    for m, other in ((model, phi), (phi, model)):
        visual = visual_alignment_loss(m.body(batch["x"]), other.body(batch["x"]).detach())
        for loss in (m(**batch).loss, visual):
            roles.append(torch.autograd.grad(loss, list(m.parameters()), allow_unused=True))
    mdgd_backward(model, optimizer, batch, tap=VisualTap(model.body, lambda b: b["marks"]))
    assert_close(grads(optimizer), expected(roles, optimizer.parameters), roles)

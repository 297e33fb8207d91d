"""The passes of one step, against a version written by hand with a second model as the reference."""

import copy
import types

import pytest
import torch
from torch import nn

from tests.properties import assert_close, assert_same_bits, expected
from tests.tiny_models import IMAGE, llava, llava_batch, qwen, qwen_batch, text_batch
from torch_mdgd import MDGDOptimizer, TopK, VisualTap, mdgd_backward, visual_alignment_loss


def trainable(model):
    """The projector, the last decoder layer and the head, as published."""
    for name, p in model.named_parameters():
        p.requires_grad_("projector" in name or "layers.1" in name or "lm_head" in name)
        if "vision" in name:
            p.requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]


def double_batch(make=llava_batch, **options):
    return {k: x.double() if x.is_floating_point() else x for k, x in make(**options).items()}


def drifted(dropout=0.2, **settings):
    """A float64 model in training mode that has left its reference, the reference as a second model, the wrapper."""
    model = llava(dropout).double().train()
    parameters = trainable(model)
    phi = copy.deepcopy(model)
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1), **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, phi, optimizer


def by_hand(model, phi, batch, kind="l1"):
    """The four gradients, from two models and autograd.grad, with one state of the random numbers for all passes."""
    state = torch.get_rng_state()

    def run(m):
        torch.set_rng_state(state)
        output = m(**batch, output_hidden_states=True)
        return output.loss, output.hidden_states[-1][batch["input_ids"] == IMAGE]

    roles = []
    for m, other in ((model, phi), (phi, model)):
        parameters = [p for p in m.parameters() if p.requires_grad]
        loss, z = run(m)
        visual = visual_alignment_loss(z, run(other)[1].detach(), kind)
        for scalar in (loss, visual):
            roles.append(torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True))
    torch.set_rng_state(state)
    return roles


def grads(optimizer):
    return [p.grad for p in optimizer.parameters]


FORMS = {
    "regularize": {},
    "reference": {"update": "reference"},
    "project": {"update": "project"},
    "global": {"scope": "global", "align": 0.3},
    "unregularized": {"regularize": 0.0},
}


@pytest.mark.parametrize("kind", ["l1", "mse"])
@pytest.mark.parametrize("name", FORMS)
def test_equals_the_version_by_hand_with_dropout(name, kind):
    model, phi, optimizer = drifted(**FORMS[name])
    batch = double_batch()
    roles = by_hand(model, phi, batch, kind)
    loss = mdgd_backward(model, optimizer, batch, alignment=kind)
    assert_close(grads(optimizer), expected(roles, optimizer.parameters, **FORMS[name]), roles)
    assert max(float(x.abs().max()) for x in roles[1] if x is not None) > 1e-4
    assert not loss.requires_grad


def test_equals_the_version_by_hand_under_a_mask():
    model, phi, optimizer = drifted(mask=TopK(0.2))
    for _ in range(2):
        batch = double_batch()
        roles = by_hand(model, phi, batch)
        mdgd_backward(model, optimizer, batch)
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
    assert optimizer.diagnostics["visual_loss"] == visual_alignment_loss(z, z_phi).item()


@pytest.mark.parametrize("make", [(lambda: llava(0.2), llava_batch), (qwen, qwen_batch)], ids=["llava", "qwen2-vl"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("update", ["regularize", "reference", "project"])
def test_fact_1_the_first_step_has_no_drift_at_all_with_dropout_on(update, padded, make):
    model, batch = make[0]().train(), make[1]()
    batch["attention_mask"][0, 0] = 0 if padded else 1
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), update=update)
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    twin(**batch).loss.backward()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    mdgd_backward(model, optimizer, batch)
    assert optimizer.diagnostics["visual_to_task"] == 0
    factor = 2 if update == "regularize" else 1
    wanted = [None if p.grad is None else factor * p.grad for p in twin.parameters()]
    assert_same_bits(grads(optimizer), wanted)
    # The next step draws other numbers, those that it would have drawn without the extra passes.
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(("settings", "forwards", "backwards"), [({}, 3, 4), ({"update": "project"}, 2, 2)])
def test_number_of_passes(settings, forwards, backwards):
    model, _, optimizer = drifted(**settings)
    seen = []
    model.lm_head.register_forward_hook(lambda *args: seen.append("forward"))
    optimizer.parameters[-1].register_post_accumulate_grad_hook(lambda p: seen.append("head"))
    optimizer.parameters[0].register_post_accumulate_grad_hook(lambda p: seen.append("backward"))
    mdgd_backward(model, optimizer, double_batch())
    assert seen.count("forward") == forwards
    assert seen.count("backward") == backwards
    # The head is not on the way to z.
    assert seen.count("head") == backwards // 2


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


@pytest.mark.parametrize("name", FORMS)
def test_a_batch_without_pictures_has_a_task_gradient_alone(name):
    model, phi, optimizer = drifted(**FORMS[name])
    g, g0 = (by_hand_task(m, text_batch()) for m in (model, phi))
    mdgd_backward(model, optimizer, text_batch())
    nothing = [None] * len(g)
    roles = [g, nothing, g0, nothing]
    assert_close(grads(optimizer), expected(roles, optimizer.parameters, **FORMS[name]), roles)
    assert optimizer.diagnostics["visual_loss"] == 0


def by_hand_task(model, batch):
    state = torch.get_rng_state()
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True)
    torch.set_rng_state(state)
    return out


@pytest.mark.parametrize("name", FORMS)
def test_micro_batches_add_up_before_the_update_is_formed(name):
    model, phi, optimizer = drifted(dropout=0.0, **FORMS[name])
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
        mdgd_backward(model, optimizer, batch, weight=0.25, combine=i == 2)
    total = [[None if x is None else x / 4 for x in role] for role in total]
    assert_close(grads(optimizer), expected(total, optimizer.parameters, **FORMS[name]), total)


def add(x, y):
    return y if x is None else x if y is None else x + y


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


def test_autocast():
    model, batch = llava(0.2).train(), llava_batch()
    optimizer = MDGDOptimizer(torch.optim.SGD(trainable(model), lr=0.1))
    with torch.autocast("cpu", torch.bfloat16):
        mdgd_backward(model, optimizer, batch)
    assert optimizer.diagnostics["visual_to_task"] == 0
    optimizer.step()
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        mdgd_backward(model, optimizer, batch)
    assert 0 < optimizer.diagnostics["visual_to_task"] < float("inf")


# What is refused.


def test_a_batch_without_labels_is_refused_and_leaves_nothing():
    model, _, optimizer = drifted()
    now = [p.detach().clone() for p in optimizer.parameters]
    batch = double_batch()
    del batch["labels"]
    with pytest.raises(RuntimeError, match="returned no loss; does the batch have labels"):
        mdgd_backward(model, optimizer, batch)
    assert_same_bits(optimizer.parameters, now)
    mdgd_backward(model, optimizer, double_batch())


def test_training_only_what_comes_after_z_is_refused():
    model = llava()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.lm_head.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="no trainable parameter influences the hidden states at image tokens"):
        mdgd_backward(model, optimizer, llava_batch())


def test_another_optimizer_is_refused():
    model = llava()
    with pytest.raises(TypeError, match="optimizer must be an MDGDOptimizer, got SGD"):
        mdgd_backward(model, torch.optim.SGD(model.parameters(), lr=0.1), llava_batch())


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_step_that_failed_half_way_can_be_tried_again(at):
    outcomes = []
    for fails in (False, True):
        model, _, optimizer = drifted(dropout=0.0)
        tap, batch = VisualTap.for_model(model), double_batch()
        calls = []

        def failing(model, batch, tap=tap, calls=calls):
            calls.append(None)
            if len(calls) == at:
                raise MemoryError
            return tap(model, batch)

        if fails:
            now = [p.detach().clone() for p in optimizer.parameters]
            with pytest.raises(MemoryError):
                mdgd_backward(model, optimizer, batch, tap=failing)
            assert_same_bits(optimizer.parameters, now)
        mdgd_backward(model, optimizer, batch)
        outcomes.append(grads(optimizer))
    assert_same_bits(*outcomes)


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

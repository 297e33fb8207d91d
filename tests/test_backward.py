"""The passes of one step, against a version written by hand with a second model as the reference."""

import copy
import types
from contextlib import nullcontext

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


@pytest.mark.parametrize("schedule", ["sequential", "together"])
@pytest.mark.parametrize("kind", ["l1", "mse"])
@pytest.mark.parametrize("name", FORMS)
def test_equals_the_version_by_hand_with_dropout(name, kind, schedule):
    model, phi, optimizer = drifted(**FORMS[name])
    batch = double_batch()
    roles = by_hand(model, phi, batch, kind)
    loss = mdgd_backward(model, optimizer, batch, alignment=kind, schedule=schedule)
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


@pytest.mark.parametrize(
    ("settings", "schedule", "forwards", "backwards"),
    [
        ({}, "sequential", 3, 4),
        ({}, "together", 2, 4),
        ({"update": "project"}, "sequential", 2, 2),
        ({"update": "project"}, "together", 2, 2),
    ],
)
def test_number_of_passes(settings, schedule, forwards, backwards):
    model, _, optimizer = drifted(**settings)
    seen = []
    model.lm_head.register_forward_hook(lambda *args: seen.append("forward"))
    optimizer.parameters[-1].register_post_accumulate_grad_hook(lambda p: seen.append("head"))
    optimizer.parameters[0].register_post_accumulate_grad_hook(lambda p: seen.append("backward"))
    mdgd_backward(model, optimizer, double_batch(), schedule=schedule)
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


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("name", [*FORMS, "step"])
def test_a_step_without_pictures_is_the_plain_one(name, batches):
    settings = {"step": {"update": "project", "space": "step", "restore": 0.1}, **FORMS}[name]
    model, _, optimizer = drifted(**settings)
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
@pytest.mark.parametrize("schedule", ["sequential", "together"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, schedule):
    outcomes = []
    for checkpointed in (False, True):
        model, _, optimizer = drifted()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            # Reentrant checkpoints need an input with a gradient.
            model.enable_input_require_grads()
        torch.manual_seed(0)
        mdgd_backward(model, optimizer, double_batch(), schedule=schedule)
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


@pytest.mark.parametrize("schedule", ["sequential", "together"])
@pytest.mark.parametrize("settings", [{}, {"update": "project"}, {"mask": TopK(0.3), "compact": True}])
def test_autocast_around_all_passes_sees_every_exchange(settings, schedule):
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
                mdgd_backward(model, optimizer, batch, schedule=schedule)
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


@pytest.mark.parametrize("schedule", ["sequential", "together"])
def test_a_loss_of_ones_own_and_weights_for_each(schedule):
    model, phi, optimizer = drifted(dropout=0.0)
    batch = double_batch()
    g, v, g0, v0 = by_hand(model, phi, batch)
    weighted = zip((g, v, g0, v0), (4, 0.5, 4, 0.5), strict=True)
    roles = [[None if x is None else w * x for x in role] for role, w in weighted]

    def loss(inputs):
        return 8 * model(**inputs).loss  # a power of two, since losses are float32

    mdgd_backward(model, optimizer, batch, loss=loss, weight=0.5, schedule=schedule)
    assert_close(grads(optimizer), expected(roles, optimizer.parameters), roles)


def test_training_only_what_comes_after_z_is_refused():
    model = llava()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.lm_head.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="no trainable parameter influences the hidden states at image tokens"):
        mdgd_backward(model, optimizer, llava_batch())


def test_together_refuses_a_model_that_writes_over_what_its_backward_pass_needs():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x, marks):
            hidden = self.body(x).exp()
            loss = self.head(hidden).square().mean()
            with torch.no_grad():
                hidden.add_(1)
            return types.SimpleNamespace(loss=loss)

    model = Writing()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    batch = {"x": torch.randn(2, 5, 3), "marks": torch.ones(2, 5, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match="wrote over a tensor that its backward pass needs"):
        mdgd_backward(model, optimizer, batch, tap=VisualTap(model.body, lambda b: b["marks"]), schedule="together")


def test_an_unknown_schedule_is_refused():
    model, _, optimizer = drifted()
    with pytest.raises(ValueError, match="schedule must be 'sequential' or 'together', got 'both'"):
        mdgd_backward(model, optimizer, double_batch(), schedule="both")


def test_another_optimizer_is_refused():
    model = llava()
    with pytest.raises(TypeError, match="optimizer must be an MDGDOptimizer, got SGD"):
        mdgd_backward(model, torch.optim.SGD(model.parameters(), lr=0.1), llava_batch())


@pytest.mark.parametrize("schedule", ["sequential", "together"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_step_that_failed_half_way_can_be_tried_again(at, schedule):
    outcomes = []
    for fails in (False, True):
        model, _, optimizer = drifted(dropout=0.0)
        tap, batch = VisualTap.for_model(model), double_batch()

        class Failing(VisualTap):
            calls = 0

            def __call__(self, model, batch):
                self.calls += 1
                if self.calls == at:
                    raise MemoryError
                return super().__call__(model, batch)

        if fails:
            now = [p.detach().clone() for p in optimizer.parameters]
            with pytest.raises(MemoryError):
                mdgd_backward(model, optimizer, batch, tap=Failing(tap.text_module, tap.mask), schedule=schedule)
            assert_same_bits(optimizer.parameters, now)
        mdgd_backward(model, optimizer, batch, schedule=schedule)
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

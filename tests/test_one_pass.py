"""d = g + αv from one backward pass is that of two, and the shorter passes give what the long ones do."""

import copy

import pytest
import torch

from tests.passes import counted
from tests.properties import assert_near, assert_same_bits
from tests.tiny_models import llava, llava_batch, text_batch
from torch_mdgd import (
    MDGD,
    DriftBudget,
    MDGDOptimizer,
    Project,
    Random,
    StepProject,
    TopK,
    VisualTap,
    connector,
    freeze_all_but,
    last_decoder_layers,
    mdgd_backward,
)

ALPHA = {"rule": lambda: MDGD(2.0, 0)}
FORMS = {
    "plain": ALPHA,
    "top": {"mask": TopK(0.2)},
    "random, compact": {**ALPHA, "mask": Random(0.2), "compact": True},
    "lazy": {"rule": lambda: MDGD(2.0, 0, every=2)},
    "budget": {"rule": lambda: DriftBudget(MDGD(1.0, 0), 0.05, measure_every=3)},
}


def build(form="plain", lr=0.05, prepare=lambda model: None):
    model = llava(dropout=0.1).train()
    prepare(model)
    parameters = freeze_all_but(model, [connector(model), *last_decoder_layers(model, 1)])
    settings = dict(FORMS[form])
    rule = settings.pop("rule", lambda: None)()
    return model, MDGDOptimizer(torch.optim.SGD(parameters, lr=lr, momentum=0.9), rule, **settings)


def away(model, optimizer, steps=3):
    """Some steps by two passes: at the very first v is zero."""
    for s in range(steps):
        mdgd_backward(model, optimizer, llava_batch(seed=100 + s), separate=True)
        optimizer.step()
        optimizer.zero_grad()


def both(form, text=False):
    """d by one pass and by two, from the same state and the same random numbers."""
    found = []
    for separate in (False, True):
        model, optimizer = build(form)
        away(model, optimizer)
        torch.manual_seed(7)
        for i in range(2):
            batch = text_batch() if text and i == 1 else llava_batch(seed=i)
            mdgd_backward(model, optimizer, batch, weight=0.5, combine=i == 1, separate=separate)
        found.append(([p.grad for p in optimizer.parameters], optimizer.diagnostics))
    return found


def assert_equal_to_rounding(one, two):
    scale = max(float(y.abs().max()) for y in two if y is not None)
    for x, y in zip(one, two, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x - y).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("form", [form for form in FORMS if form != "budget"])
def test_one_pass_equals_two(form):
    (one, diagnostics), (two, others) = both(form)
    assert_equal_to_rounding(one, two)
    assert diagnostics["visual_loss"] == pytest.approx(others["visual_loss"], rel=1e-6)


def test_with_a_micro_batch_of_text_alone():
    (one, _), (two, _) = both("plain", text=True)
    assert_equal_to_rounding(one, two)


def test_under_loss_scaling_and_clipping():
    found = []
    for separate in (False, True):
        model, optimizer = build()
        away(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        torch.manual_seed(7)
        mdgd_backward(model, optimizer, llava_batch(), scaler=scaler, separate=separate)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 0.01)
        found.append([p.grad for p in optimizer.parameters])
    assert_equal_to_rounding(*found)


def test_with_gradient_checkpointing():
    found = []
    for separate in (False, True):
        model, optimizer = build(
            prepare=lambda m: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        )
        away(model, optimizer)
        torch.manual_seed(7)
        mdgd_backward(model, optimizer, llava_batch(), separate=separate)
        found.append([p.grad for p in optimizer.parameters])
    assert_equal_to_rounding(*found)


@pytest.mark.parametrize("form", FORMS)
def test_how_many_passes_there_are(form):
    model, optimizer = build(form)
    away(model, optimizer, steps=5)
    forward, backward = [], []
    model.model.language_model.register_forward_hook(lambda *_: forward.append(torch.is_grad_enabled()))
    # Once a backward pass through it.
    model.model.language_model.norm.register_full_backward_hook(lambda *_: backward.append(1))
    mdgd_backward(model, optimizer, llava_batch())
    assert forward == [False, True]
    assert len(backward) == 1


@pytest.mark.parametrize("rule", [Project, StepProject, MDGD])
def test_rules_that_need_the_two_apart_take_two(rule):
    model = llava().train()
    parameters = freeze_all_but(model, last_decoder_layers(model, 1))
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1), rule())
    assert optimizer.joint() is None
    with pytest.raises(RuntimeError, match="apart"), optimizer.capture("joint"):
        pass


def test_groups_with_weights_of_their_own_take_two():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    base = torch.optim.SGD([{"params": [a], "mdgd_align": 2.0}, {"params": [b]}], lr=0.1)
    optimizer = MDGDOptimizer(base, MDGD(1.0, 0))
    assert optimizer.joint() is None
    optimizer.param_groups[0]["mdgd_align"] = 1.0
    assert optimizer.joint() == 1.0


def test_joint_and_separate_captures_do_not_mix():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.1), MDGD(1.0, 0))
    with optimizer.capture("joint"):
        p.sum().backward()
    with optimizer.capture("task"):
        p.sum().backward()
    with pytest.raises(RuntimeError, match="not both"):
        optimizer.combine()


def test_diagnostics_are_measured_when_asked():
    model, optimizer = build()
    away(model, optimizer, steps=2)
    measured = []
    for s in range(6):
        mdgd_backward(model, optimizer, llava_batch(seed=s), diagnose_every=3)
        optimizer.step()
        optimizer.zero_grad()
        measured.append("cos_task_visual" in optimizer.diagnostics)
    # The last step before has taken them apart.
    assert measured == [False, False, True, False, False, True]


def test_lazy_takes_v_at_the_last_of_k_steps_k_fold():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=1.0), MDGD(0.5, 0, every=3))
    moves = []
    for _ in range(6):
        kinds = optimizer.needs()
        optimizer.set_gradients(**{kind: [torch.full((1,), {"task": 1.0, "visual": 10.0}[kind])] for kind in kinds})
        before = p.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        moves.append(float(before - p.detach()))
    assert moves == [1.0, 1.0, 1.0 + 3 * 0.5 * 10.0] * 2


def test_a_lazy_v_is_measured_at_the_first_of_its_steps_that_is_due():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=1.0), MDGD(0.5, 0, every=2))
    apart = []
    for _ in range(6):
        kinds = optimizer.needs() if optimizer.joint(measure_every=2) is None else ("joint",)
        for kind in kinds:
            with optimizer.capture(kind):
                p.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        apart.append("visual" in kinds)
    assert apart == [False, True] * 3


def test_lazy_resumes_within_its_round():
    def build():
        p = torch.nn.Parameter(torch.zeros(1))
        return p, MDGDOptimizer(torch.optim.SGD([p], lr=1.0), MDGD(0.5, 0, every=3))

    _, optimizer = build()
    optimizer.set_gradients(task=[torch.ones(1)])
    optimizer.step()
    optimizer.zero_grad()
    _, other = build()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kinds = []
    for o in (optimizer, other):
        o.set_gradients(task=[torch.ones(1)])
        o.step()
        kinds.append(o.needs())
    assert kinds == [("task", "visual")] * 2


def test_lazy_needs_no_r():
    with pytest.raises(ValueError, match="every > 1"):
        MDGD(1.0, 0.5, every=2)


def test_a_budget_that_is_measured_now_and_then_follows_one_that_always_is():
    ends = []
    for every in (1, 4):
        model = llava().train()
        parameters = freeze_all_but(model, [connector(model), *last_decoder_layers(model, 1)])
        rule = DriftBudget(MDGD(1.0, 0), 0.02, measure_every=every)
        optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.05), rule)
        for s in range(40):
            mdgd_backward(model, optimizer, llava_batch(seed=s % 4))
            optimizer.step()
            optimizer.zero_grad()
        ends.append(float(optimizer.diagnostics["visual_drift"]))
    assert ends[1] == pytest.approx(ends[0], rel=0.5)


def test_features_without_the_head_are_those_of_a_whole_run():
    model = llava().train()
    tap = VisualTap.for_model(model)
    with torch.no_grad():
        _, z = tap(model, llava_batch())
    heads = []
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    assert_same_bits([tap.features(model, llava_batch())], [z])
    assert not heads
    assert not tap.text_module._forward_hooks


def test_frozen_layers_at_the_beginning_run_once():
    model = llava().eval()
    parameters = freeze_all_but(model, last_decoder_layers(model, 1))
    wanted = []
    for reuse in (False, True):
        optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1), MDGD(1.0, 0))
        calls = counted(model.model.language_model.layers[0].self_attn)
        mdgd_backward(model, optimizer, llava_batch(), reuse_vision=reuse)
        wanted.append([p.grad.clone() for p in parameters])
        optimizer.zero_grad()
        assert len(calls) == (1 if reuse else 2)
    assert_near(*wanted)
    assert model.config.text_config.use_cache

"""A drift budget: features stay near it, whatever the units of losses and features, and a resumed run is the same."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch, text_batch
from torch_mdgd import (
    MDGD,
    MDGDOptimizer,
    Project,
    Random,
    StepProject,
    VisualTap,
    mdgd_backward,
    visual_alignment_loss,
)
from torch_mdgd.rules.budget import LIMITS, SPAN, DriftBudget, drift_sums

PULL = "mdgd_drift_pull"


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def wrap(model, budget=0.05, rule=None, **settings):
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-30)
    return MDGDOptimizer(base, DriftBudget(rule or MDGD(regularize=0.0), budget), **settings)


def train(model, optimizer, steps, task_scale=1.0, feature_scale=1.0, kind="l1"):
    """A task that moves the features z, the hidden layer; returns drift and α at each step."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator).double()
    y = torch.randn(64, 3, generator=generator).double()
    seen = []
    for _ in range(steps):
        with torch.no_grad(), optimizer.reference():
            z_ref = feature_scale * model[:2](x)
        z = feature_scale * model[:2](x)
        with optimizer.capture("visual"):
            visual_alignment_loss(z, z_ref, kind).backward()
        with optimizer.capture("task"):
            (task_scale * (model(x) - y).square().mean()).backward()
        optimizer.rule.saw_features(z, z_ref)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((optimizer.diagnostics["visual_drift"], optimizer.diagnostics["align"]))
    return seen


@pytest.mark.parametrize(
    ("budget", "settings", "kind"),
    [
        (0.02, {}, "l1"),
        (0.1, {}, "l1"),
        (0.1, {"rule": MDGD(align=5.0, regularize=0.0)}, "l1"),
        (0.05, {"rule": Project()}, "l1"),
        (0.05, {}, "mse"),
        (0.05, {"mask": Random(0.5)}, "l1"),
    ],
)
def test_the_drift_settles_near_the_budget(budget, settings, kind):
    model = network()
    drift = [x for x, _ in train(model, wrap(model, budget, **settings), 140, kind=kind)]
    assert sum(drift[-60:]) / 60 == pytest.approx(budget, rel=0.2)
    assert max(drift[80:]) < 2 * budget


def test_without_a_budget_the_features_drift_beyond_it():
    # What the test above would pass without, if the task left the features alone.
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-30)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).double()
    before = model[:2](x).detach()
    for _ in range(60):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    distance, size = drift_sums(model[:2](x), before)
    assert distance / size > 0.3


@pytest.mark.parametrize("scales", [{"task_scale": 2.0**-10}, {"feature_scale": 2.0**12}])
def test_units_of_task_loss_and_features_do_not_matter(scales):
    first, second = network(), network()
    plain, scaled = train(first, wrap(first), 60), train(second, wrap(second), 60, **scales)
    assert [x for x, _ in scaled] == pytest.approx([x for x, _ in plain], rel=1e-6)
    factor = scales.get("task_scale", 1.0) / scales.get("feature_scale", 1.0)
    assert scaled[30][1] == pytest.approx(plain[30][1] * factor, rel=1e-6)


def table(g, v):
    """Inner products of two parallel vectors of these lengths."""
    return torch.tensor([[[g * g, g * v], [g * v, v * v]]], dtype=torch.float64)


def align(rule, drift, products):
    """α of a step whose features have moved by this part of their size."""
    one = torch.ones(1, 1, dtype=torch.float64)
    rule.saw_features((1 + drift) * one, one)
    coefficients = rule.coefficients(products, {"align": one[0], "regularize": 0 * one[0]}, False)
    rule.forget()
    return float(coefficients[0, 1])


def test_the_strength_by_hand():
    rule, held = DriftBudget(MDGD(), 0.1), 1.0
    # Drifts that float32 holds, in which features are compared.
    for drift, q in ((0.0, 1.0), (0.25, 2.5), (2.0**-7, 1 / SPAN), (5.0, SPAN), (math.nan, 1.0), (math.inf, 1.0)):
        held *= q**0.05
        assert align(rule, drift, table(6.0, 2.0)) == pytest.approx(held * q * 3.0, rel=1e-12)
        assert float(rule.pull) == pytest.approx(held, rel=1e-12)


def test_a_zero_gradient_pulls_nowhere():
    assert align(DriftBudget(MDGD(), 0.1), 0.25, table(1.0, 0.0)) == 0.0


def test_the_pull_stays_within_its_limits():
    for drift, limit in ((2.0**-20, LIMITS[0]), (2.0**20, LIMITS[1])):
        rule = DriftBudget(MDGD(), 0.1)
        for _ in range(200):
            align(rule, drift, table(1.0, 1.0))
        assert float(rule.pull) == limit


def test_groups_keep_their_weights_relative_to_each_other():
    model = network()
    groups = [{"params": model[0].parameters(), "mdgd_align": 3.0}, {"params": model[2].parameters(), "mdgd_align": 0}]
    optimizer = MDGDOptimizer(torch.optim.SGD(groups, lr=0.1), DriftBudget(MDGD(regularize=0), 0.1))
    g, v = [torch.zeros_like(p) for p in model.parameters()], [torch.ones_like(p) for p in model.parameters()]
    g[0][0, 0] = 2.0
    optimizer.set_gradients(task=g, visual=v)
    optimizer.rule.saw_features(torch.full((1, 1), 1.25), torch.ones(1, 1))
    optimizer.combine()
    strength = 2.5**1.05 * 2.0 / math.sqrt(sum(p.numel() for p in model.parameters()))
    assert torch.allclose(model[0].bias.grad, torch.full_like(model[0].bias, 3 * strength), rtol=1e-12)
    assert not model[2].weight.grad.any()
    assert optimizer.diagnostics["align"] == pytest.approx(3 * strength, rel=1e-12)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit():
    through, interrupted = network(), network()
    one, two = wrap(through), wrap(interrupted)
    train(through, one, 12)
    train(interrupted, two, 5)
    saved = copy.deepcopy((interrupted.state_dict(), two.state_dict()))
    resumed = network()
    resumed_optimizer = wrap(resumed)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    train(resumed, resumed_optimizer, 7)
    assert_same_bits(list(through.parameters()), list(resumed.parameters()))


def test_what_is_held_between_measurements_is_loaded_and_without_it_begins_anew():
    one = torch.ones(1, dtype=torch.float64)
    w = {"align": one, "regularize": 0 * one}
    saved, loaded = (DriftBudget(MDGD(regularize=0), 0.1, measure_every=3) for _ in range(2))
    align(saved, 0.25, table(6.0, 2.0))
    loaded.load_state({name: [x] for name, x in saved.state().items()}, [one])
    assert loaded.joint(w, False) == pytest.approx(2.5**1.05 * 3.0, rel=1e-12)
    # A step that measures nothing has the ratio of the one that did, and the third measures anew.
    for q, pull in ((1.25, 2.5 * 1.25), (1.25, 2.5 * 1.25**2)):
        loaded.saw_features(torch.tensor([[1.125]]), torch.tensor([[1.0]]))
        loaded.coefficients(torch.full((1, 1, 1), math.nan, dtype=torch.float64), w, False)
        loaded.forget()
        assert float(loaded.strength) == pytest.approx(pull**0.05 * q * 3.0, rel=1e-12)
    assert loaded.joint(w, False) is None
    loaded.load_state({}, [one])
    assert (float(loaded.pull), float(loaded.strength), float(loaded.ratio), loaded.age) == (1.0, 0.0, 0.0, 0)


def test_a_state_dict_does_not_change_when_training_goes_on():
    model = network()
    optimizer = wrap(model)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()["state"]
    before = float(optimizer.rule.pull)
    assert [float(entry[PULL]) for entry in saved.values()] == [before] * len(list(model.parameters()))
    train(model, optimizer, 3)
    assert float(saved[0][PULL]) == before != float(optimizer.rule.pull)


@pytest.mark.parametrize("budget", [0, -0.1, math.nan, math.inf, "auto"])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match="DriftBudget: budget must be a finite number > 0"):
        wrap(network(), budget)


def test_a_budget_that_could_set_nothing_is_refused():
    for rule in (MDGD(align=0.0), StepProject(restore=0.1)):
        with pytest.raises(ValueError, match=r"pass a rule with an align above 0, not (MDGD|StepProject)\("):
            DriftBudget(rule, 0.1)
    with pytest.raises(TypeError, match="DriftBudget: rule must be a Rule such as MDGD"):
        DriftBudget(0.1, 0.1)


def test_a_step_whose_drift_nobody_told_is_an_error_that_names_the_call():
    model = network()
    optimizer = wrap(model)
    ones = [torch.ones_like(p) for p in model.parameters()]
    optimizer.set_gradients(task=ones, visual=ones)
    with pytest.raises(RuntimeError, match=r"rule\.saw_features"):
        optimizer.step()


def test_the_passes_of_a_step_tell_of_all_its_tokens():
    model = llava().double()
    model.model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    phi = copy.deepcopy(model)
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1), DriftBudget(MDGD(regularize=0.0), 0.05))
    with torch.no_grad():
        for p in parameters:
            p.mul_(1.01)
    batches = [llava_batch(images=2), text_batch(), llava_batch(seed=1, images=1)]
    batches = [{k: x.double() if x.is_floating_point() else x for k, x in batch.items()} for batch in batches]
    tap = VisualTap.for_model(model)
    with torch.no_grad():
        pairs = [(tap(model, b)[1], VisualTap.for_model(phi)(phi, b)[1]) for b in (batches[0], batches[2])]
    for i, batch in enumerate(batches):
        mdgd_backward(model, optimizer, batch, combine=i == 2, weight=1 / 3)
    z, z_ref = (torch.cat(side) for side in zip(*pairs, strict=True))
    wanted = float((z - z_ref).abs().sum() / z_ref.abs().sum())
    assert optimizer.diagnostics["visual_drift"] == pytest.approx(wanted, rel=1e-5)
    optimizer.step()
    optimizer.zero_grad()
    held = float(optimizer.rule.pull)
    mdgd_backward(model, optimizer, text_batch())
    optimizer.step()
    assert float(optimizer.rule.pull) == held != 1

"""A drift budget: features stay near it, whatever the units of losses and features, and a resumed run is the same."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch, text_batch
from torch_mdgd import MDGDOptimizer, Random, VisualTap, mdgd_backward, visual_alignment_loss
from torch_mdgd.budget import LIMITS, PULL, SPAN, DriftBudget, drift_sums


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def wrap(model, budget=0.05, **settings):
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-30)
    return MDGDOptimizer(base, drift_budget=budget, **{"regularize": 0.0, **settings})


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
        optimizer.observe_drift(drift_sums(z, z_ref))
        optimizer.step()
        optimizer.zero_grad()
        seen.append((optimizer.diagnostics["visual_drift"], optimizer.diagnostics["align"]))
    return seen


@pytest.mark.parametrize(
    ("budget", "settings", "kind"),
    [
        (0.02, {}, "l1"),
        (0.1, {}, "l1"),
        (0.1, {"align": 5.0}, "l1"),
        (0.05, {"update": "project"}, "l1"),
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
    optimizer = wrap(model, None, align=0.0)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).double()
    before = model[:2](x).detach()
    for _ in range(60):
        optimizer.set_gradients(
            task=torch.autograd.grad((model(x) - 1).square().mean(), list(model.parameters())), visual=[None] * 4
        )
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


def groups(align=1.0, space="gradient"):
    return [{"align": align, "space": space}]


def table(g, v):
    """Inner products of two parallel vectors of these lengths."""
    return torch.tensor([[[g * g, g * v], [g * v, v * v]]], dtype=torch.float64)


def test_the_strength_by_hand():
    budget, held = DriftBudget(0.1, held_groups := groups()), 1.0
    for drift, q in ((0.0, 1.0), (0.2, 2.0), (0.01, 1 / SPAN), (5.0, SPAN), (math.nan, 1.0), (math.inf, 1.0)):
        held *= q**0.05
        strength = budget.strength(torch.tensor(drift, dtype=torch.float64), table(6.0, 2.0), held_groups)
        assert float(strength) == pytest.approx(held * q * 3.0, rel=1e-12)
        assert float(held_groups[0][PULL]) == pytest.approx(held, rel=1e-12)


def test_nothing_to_measure_leaves_the_pull_alone_and_a_zero_gradient_pulls_nowhere():
    budget, own = DriftBudget(0.1, held := groups()), torch.tensor(0.7, dtype=torch.float64)
    held[0][PULL] = own
    assert float(budget.strength(None, table(1.0, 0.0), held)) == 0.0
    assert held[0][PULL] is own


def test_the_pull_stays_within_its_limits():
    for drift, limit in ((1e-6, LIMITS[0]), (1e6, LIMITS[1])):
        budget, held = DriftBudget(0.1, own := groups()), own
        for _ in range(200):
            budget.strength(torch.tensor(drift, dtype=torch.float64), table(1.0, 1.0), held)
        assert float(held[0][PULL]) == limit


def test_groups_keep_their_weights_relative_to_each_other():
    model = network()
    base = torch.optim.SGD(
        [{"params": model[0].parameters(), "align": 3.0}, {"params": model[2].parameters(), "align": 0.0}], lr=0.1
    )
    optimizer = MDGDOptimizer(base, drift_budget=0.1, regularize=0.0)
    g, v = [torch.zeros_like(p) for p in model.parameters()], [torch.ones_like(p) for p in model.parameters()]
    g[0][0, 0] = 2.0
    optimizer.set_gradients(task=g, visual=v)
    optimizer.observe_drift(torch.tensor([0.1, 1.0], dtype=torch.float64))
    optimizer.combine()
    strength = 2.0 / math.sqrt(sum(p.numel() for p in model.parameters()))
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


def test_a_state_dict_does_not_change_when_training_goes_on():
    model = network()
    optimizer = wrap(model)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    before = float(saved["param_groups"][0][PULL])
    train(model, optimizer, 3)
    assert float(saved["param_groups"][0][PULL]) == before != float(optimizer.param_groups[0][PULL])


@pytest.mark.parametrize("budget", [0, -0.1, math.nan, math.inf, "auto"])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match="drift_budget must be a finite number > 0"):
        wrap(network(), budget)


def test_a_budget_that_could_set_nothing_is_refused():
    with pytest.raises(ValueError, match="align above 0"):
        wrap(network(), align=0.0)
    with pytest.raises(ValueError, match="with space='step', pass restore"):
        wrap(network(), update="project", space="step")


def test_a_step_whose_drift_nobody_told_is_an_error_that_names_the_call():
    model = network()
    optimizer = wrap(model)
    ones = [torch.ones_like(p) for p in model.parameters()]
    optimizer.set_gradients(task=ones, visual=ones)
    with pytest.raises(RuntimeError, match="observe_drift"):
        optimizer.step()


def test_the_passes_of_a_step_tell_of_all_its_tokens():
    model = llava().double()
    parameters = [p for name, p in model.named_parameters() if "vision" not in name]
    phi = copy.deepcopy(model)
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1), drift_budget=0.05, regularize=0.0)
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
    held = optimizer.param_groups[0][PULL].clone()
    mdgd_backward(model, optimizer, text_batch())
    optimizer.step()
    assert torch.equal(optimizer.param_groups[0][PULL], held)

"""Gradients at the reference for several steps: what is used again, when it is not, and what it saves."""

import copy
import io

import pytest
import torch

from tests.passes import by_hand, by_hand_task, double_batch, drifted, grads
from tests.properties import assert_close, assert_same_bits, expected
from tests.strategies import make_case
from tests.tiny_models import text_batch
from torch_mdgd import MDGDOptimizer, TopK, equations, mdgd_backward
from torch_mdgd.roles import ROLES

SHAPES, F64 = [(3, 4), (5,)], (torch.float64,) * 2
SETTINGS = {
    "regularize": {},
    "global": {"scope": "global", "align": 0.3},
    "reference": {"update": "reference"},
    "masked reference": {"update": "reference", "mask": TopK(0.5)},
}


def wrapped(case, every, base=torch.optim.SGD, **settings):
    return MDGDOptimizer(base(case.parameters, lr=0.1), reference_every=every, **settings)


def give(optimizer, case, scale=1.0):
    """Set the gradients that the optimizer asks for; whether the reference's were among them."""
    required = optimizer.required_roles
    given = {role: case.gradients[role] for role in required}
    optimizer.set_gradients(**{role: [None if x is None else scale * x for x in row] for role, row in given.items()})
    return len(required) == len(ROLES)


def cases(count):
    return [make_case(SHAPES, F64, seed) for seed in range(count)]


@pytest.mark.parametrize("name", SETTINGS)
def test_three_steps_share_the_first_ones_reference(name):
    settings, steps = SETTINGS[name], cases(7)
    optimizer = wrapped(steps[0], 3, **settings)
    asked = []
    for i, case in enumerate(steps):
        asked.append(give(optimizer, case))
        optimizer.combine()
        # As if g0 and v0 of the last step that took them had come with this one's g and v.
        held = steps[i - i % 3]
        roles = [*case.roles[:2], *held.roles[2:]]
        form = dict(settings)
        if form.pop("mask", None):
            form["masks"] = [entry["mdgd_mask"] for entry in optimizer.state_dict()["state"].values()]
        assert_close(grads(optimizer), expected(roles, optimizer.parameters, **form), roles)
        optimizer.step()
        optimizer.zero_grad()
    assert asked == [True, False, False, True, False, False, True]


def test_every_step_is_the_default():
    runs = [[], []]
    for run, settings in zip(runs, ({}, {"reference_every": 1}), strict=True):
        model, _, optimizer = drifted(**settings)
        for seed in range(3):
            torch.manual_seed(seed)
            mdgd_backward(model, optimizer, double_batch(seed=seed))
            optimizer.step()
            optimizer.zero_grad()
        run += optimizer.parameters
        assert "reference_age" not in optimizer.param_groups[0]
        assert "mdgd_recalled" not in optimizer.state_dict()["state"][0]
    assert_same_bits(*runs)


@pytest.mark.parametrize("schedule", ["sequential", "together"])
def test_it_saves_passes(schedule):
    model, phi, optimizer = drifted(reference_every=3)
    seen, held = [], None
    model.lm_head.register_forward_hook(lambda *args: seen.append("forward"))
    optimizer.parameters[0].register_post_accumulate_grad_hook(lambda p: seen.append("backward"))
    passes = []
    for seed in range(4):
        batch = double_batch(seed=seed)
        roles = by_hand(model, phi, batch)
        held = roles[2:] if seed % 3 == 0 else held
        seen.clear()
        mdgd_backward(model, optimizer, batch, schedule=schedule)
        passes.append((seen.count("forward"), seen.count("backward")))
        roles = [*roles[:2], *held]
        assert_close(grads(optimizer), expected(roles, optimizer.parameters), roles)
        optimizer.step()
        optimizer.zero_grad()
    first = (3, 4) if schedule == "sequential" else (2, 4)
    assert passes == [first, (2, 2), (2, 2), first]


def test_micro_batches_of_one_step_are_all_with_reference_or_all_without():
    model, _, optimizer = drifted(reference_every=2)
    taken, seen = [], []
    optimizer.parameters[0].register_post_accumulate_grad_hook(lambda p: seen.append(None))
    for _ in range(3):
        for last in (False, True):
            mdgd_backward(model, optimizer, double_batch(), combine=last, weight=0.5)
            taken.append(len(seen))
            seen.clear()
        assert optimizer.diagnostics["regularizer_to_task"] > 0
        optimizer.step()
        optimizer.zero_grad()
    assert taken == [4, 4, 2, 2, 4, 4]


def test_a_step_without_pictures_neither_uses_it_nor_counts():
    model, _, optimizer = drifted(reference_every=2)
    asked = []
    for batch in (double_batch(), text_batch(), text_batch(), double_batch(), double_batch()):
        asked.append(len(optimizer.required_roles))
        g = by_hand_task(model, batch)
        mdgd_backward(model, optimizer, batch)
        if "pixel_values" not in batch:
            assert_same_bits(grads(optimizer), g)
        optimizer.step()
        optimizer.zero_grad()
    assert asked == [4, 2, 2, 2, 4]


def test_a_loss_scale_that_changes_meanwhile_is_of_no_account():
    outcomes = []
    for scales in ((1.0, 1.0, 1.0), (4.0, 2.0, 8.0)):
        steps = cases(3)
        optimizer = wrapped(steps[0], 3)
        for case, scale in zip(steps, scales, strict=True):
            give(optimizer, case, scale)
            optimizer.combine()
            for p in optimizer.parameters:
                p.grad.div_(scale)
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(optimizer.parameters)
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_a_step_that_a_scaler_skipped_leaves_nothing_to_use_again(clear):
    steps = cases(3)
    steps[0].gradients["reference_task"][0][0, 0] = torch.inf
    optimizer = wrapped(steps[0], 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    asked = []
    for case in steps:
        asked.append(give(optimizer, case))
        optimizer.combine()
        scaler.step(optimizer)
        scaler.update()
        if clear == "optimizer":
            optimizer.zero_grad()
        for p in optimizer.parameters:
            p.grad = None
    assert asked == [True, True, False]
    assert all(p.isfinite().all() for p in optimizer.parameters)


def test_a_skipped_step_in_between_keeps_what_is_held():
    steps = cases(4)
    steps[1].gradients["task"][0][0, 0] = torch.inf
    optimizer = wrapped(steps[0], 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    asked = []
    for case in steps:
        asked.append(give(optimizer, case))
        optimizer.combine()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert asked == [True, False, False, False]
    assert len(optimizer.required_roles) == len(ROLES)


def test_a_skipped_steps_reference_is_not_kept_by_a_later_step_of_the_plain_optimizer():
    (case,) = cases(1)
    case.gradients["reference_task"][0][0, 0] = torch.inf
    optimizer = wrapped(case, 3)
    give(optimizer, case)
    optimizer.combine()
    for p in optimizer.parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    assert len(optimizer.required_roles) == len(ROLES)


def test_a_mask_is_chosen_from_gradients_of_its_own_step():
    steps = cases(6)
    optimizer = wrapped(steps[0], 10, update="reference", mask=TopK(0.25, refresh=2))
    asked = []
    for case in steps:
        chooses = optimizer.chooses_mask
        asked.append(give(optimizer, case))
        optimizer.step()
        if chooses:
            g, v, g0, v0 = case.gradients.values()
            parts = zip(g, v, g0, v0, strict=True)
            scores = torch.cat([(equations.decouple(*x[:2]) * equations.decouple(*x[2:])) for x in map(flatten, parts)])
            kept = torch.cat([e["mdgd_mask"].flatten() for e in optimizer.state_dict()["state"].values()])
            assert kept.sum() == round(0.25 * scores.numel())
            assert scores[kept].min() >= scores[~kept].max()
        optimizer.zero_grad()
    assert asked == [True, False, True, False, True, False]


def flatten(tensors):
    return [x.flatten() for x in tensors]


@pytest.mark.parametrize("settings", [{"update": "project"}, {"regularize": 0.0}, {"mask": TopK(0.5)}])
def test_nothing_to_share_is_refused_and_where_it_is_so_later_nothing_is_kept(settings):
    steps = cases(2)
    with pytest.raises(ValueError, match="reference_every shares gradients at the reference, which this update does"):
        wrapped(steps[0], 3, **settings)
    if "mask" in settings:
        return
    optimizer = wrapped(steps[0], 3)
    optimizer.param_groups[0].update(settings)
    optimizer.set_gradients(**steps[0].gradients)
    optimizer.step()
    optimizer.zero_grad()
    assert not optimizer.state_dict()["state"][0]["mdgd_recalled"].any()
    assert optimizer.required_roles == ROLES[:2]


@pytest.mark.parametrize(
    "settings", [{}, {**SETTINGS["masked reference"], "compact": True}, SETTINGS["masked reference"]]
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_resumed_is_uninterrupted_bit_for_bit(at, settings):
    steps = cases(5)
    # No gradient at φ, and later none at all: then it stays without one, and weight decay leaves it alone.
    for case in steps:
        case.gradients["reference_task"][1] = case.gradients["reference_visual"][1] = None
    for case in steps[2:]:
        case.gradients["task"][1] = case.gradients["visual"][1] = None

    def run(optimizer, steps):
        asked = []
        for case in steps:
            asked.append(give(optimizer, case))
            optimizer.step()
            optimizer.zero_grad()
        return asked

    def build(case):
        return wrapped(case, 3, torch.optim.AdamW, **settings)

    whole = build(copy.deepcopy(steps[0]))
    asked = run(whole, steps)
    first = build(copy.deepcopy(steps[0]))
    run(first, steps[:at])
    file = io.BytesIO()
    torch.save((first.parameters, first.state_dict()), file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    resumed = build(copy.deepcopy(steps[0]))
    with torch.no_grad():
        for p, x in zip(resumed.parameters, values, strict=True):
            p.copy_(x)
    resumed.load_state_dict(state)
    assert run(resumed, steps[at:]) == asked[at:]
    assert_same_bits(resumed.parameters, whole.parameters)


def test_a_state_dict_without_it_begins_anew_and_one_with_it_is_dropped_by_who_takes_it_each_step():
    steps = cases(2)
    plain, every = wrapped(copy.deepcopy(steps[0]), 1), wrapped(copy.deepcopy(steps[0]), 3)
    for optimizer in (plain, every):
        give(optimizer, steps[0])
        optimizer.step()
        optimizer.zero_grad()
    one, other = plain.state_dict(), every.state_dict()
    every.load_state_dict(one)
    plain.load_state_dict(other)
    assert len(every.required_roles) == len(plain.required_roles) == len(ROLES)
    assert "mdgd_recalled" not in plain.state_dict()["state"][0]
    for optimizer, wanted in ((every, 2), (plain, 4)):
        give(optimizer, steps[1])
        optimizer.step()
        assert len(optimizer.required_roles) == wanted


def test_copies_go_on_as_the_original():
    steps = cases(3)
    optimizer = wrapped(steps[0], 3)
    give(optimizer, steps[0])
    optimizer.step()
    optimizer.zero_grad()
    twin = copy.deepcopy(optimizer)
    for o in (optimizer, twin):
        assert not give(o, steps[1])
        o.step()
        o.zero_grad()
    assert_same_bits(twin.parameters, optimizer.parameters)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_only_a_whole_number_of_steps(every):
    (case,) = cases(1)
    with pytest.raises(ValueError, match="reference_every must be a whole number from 1, got"):
        wrapped(case, every)

"""What random sequences of legal calls, beside a plain model of the optimizer in float64, have found to go wrong."""

import copy

import pytest
import torch
from torch import nn

from tests.networks import network
from tests.properties import assert_near, assert_same_bits
from tests.rules import protected
from torch_mdgd import MDGD, Anchor, DriftBudget, Magnitude, MDGDOptimizer, ProtectInputs, StepProject, TopK
from torch_mdgd.rules.base import KINDS


def parameters(*shapes, frozen=()):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator), i not in frozen) for i, s in enumerate(shapes)]


def sgd(held, rule=None, **settings):
    return MDGDOptimizer(torch.optim.SGD(held, lr=0.1), MDGD(regularize=0) if rule is None else rule, **settings)


def step(optimizer, kinds=KINDS):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(p.shape, generator=generator) if p.requires_grad else None for p in optimizer.parameters]
    optimizer.set_gradients(**dict.fromkeys(kinds, rows))
    optimizer.step()
    optimizer.zero_grad()


def at_reference(optimizer):
    with optimizer.reference():
        return [p.detach().clone() for p in optimizer.parameters]


# ---------------------------------------------------------------------------------------------------------------------
# Parameters that are frozen at one time and trained at another.


@pytest.mark.parametrize("compact", [False, True])
def test_what_was_frozen_in_a_checkpoint_has_no_place_in_its_mask(compact):
    settings = {"mask": TopK(0.5), "compact": compact}
    source = sgd(parameters((6,), (6,), frozen=[1]), **settings)
    step(source)
    held = parameters((6,), (6,))
    # It is trained where the optimizer is made, frozen where the checkpoint is loaded, and then trained again.
    optimizer = sgd(held, **settings)
    held[1].requires_grad_(False)
    optimizer.load_state_dict(source.state_dict())
    held[1].requires_grad_(True)
    before = held[1].detach().clone()
    with pytest.warns(UserWarning, match="parameter 1 requires gradients only since the mask was chosen"):
        step(optimizer)
    assert_same_bits([held[1]], [before])
    assert optimizer.diagnostics["kept_fraction"] == 3 / 12


@pytest.mark.parametrize("compact", [False, True])
def test_a_mask_after_resuming_does_not_count_what_was_frozen_in_the_checkpoint(compact):
    settings = {"mask": TopK(0.5), "compact": compact}
    source = sgd(parameters((6,), (6,), frozen=[1]), **settings)
    held = parameters((6,), (6,))
    optimizer = sgd(held, **settings)
    held[1].requires_grad_(False)
    optimizer.load_state_dict(source.state_dict())
    before = held[0].detach().clone()
    step(optimizer)
    assert (held[0] != before).sum() == 3, "half of its six, and not of twelve"


def test_a_mask_after_resuming_counts_what_has_been_trained_before():
    outcomes = []
    for resumed in (False, True):
        held = parameters((6,), (6,))
        optimizer = sgd(held, mask=TopK(0.5), compact=True)
        held[1].requires_grad_(False)
        if resumed:
            state = optimizer.state_dict()
            optimizer = sgd(held, mask=TopK(0.5), compact=True)
            optimizer.load_state_dict(state)
        step(optimizer)
        outcomes.append((held, optimizer.diagnostics["kept_fraction"]))
    (one, fraction), (other, same) = outcomes
    assert_same_bits(one, other)
    assert fraction == same == 0.5


def test_the_reference_of_what_is_unfrozen_is_its_value_before_a_step_of_the_wrapped_optimizer_alone():
    held = parameters((3,), (3,), frozen=[1])
    optimizer = sgd(held)
    before = copy.deepcopy(held)
    held[1].requires_grad_(True)
    for p in held:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(held[1], before[1])
    assert_same_bits(at_reference(optimizer), before)


@pytest.mark.parametrize("compact", [False, True])
def test_what_is_unfrozen_shares_no_memory_with_another(compact):
    first, other = parameters((4,), (4,), frozen=[1])
    other.data = first.data
    optimizer = sgd([first, other], mask=Magnitude(0.5) if compact else None, compact=compact)
    other.requires_grad_(True)
    with pytest.raises(ValueError, match="parameters 0 and 1 share memory"):
        at_reference(optimizer)


RULES = {
    "Anchor": lambda model: Anchor(model, 50.0, tokens="all", warmup=1, text_module=model.decoder),
    "ProtectInputs": lambda model: ProtectInputs(model, 0.5, refresh=1, text_module=model.decoder),
}


@pytest.mark.parametrize("live", ["none", "bias"])
@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_knows_of_a_layer_that_is_frozen_now_is_there_when_it_is_trained(rule, live):
    outcomes = []
    for resumed in (False, True):
        model = protected.Model()
        layer = model.decoder.first
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(live == "bias")
        optimizer = sgd(model.parameters(), RULES[rule](model))
        observed_step(model, optimizer, 0)
        layer.requires_grad_(False)
        if resumed:
            state = optimizer.state_dict()
            optimizer = sgd(model.parameters(), RULES[rule](model))
            optimizer.load_state_dict(state)
        layer.requires_grad_(True)
        for seed in (1, 2):
            observed_step(model, optimizer, seed)
        outcomes.append(list(model.parameters()))
    assert_near(*outcomes)


def observed_step(model, optimizer, seed):
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.int64)}
    with optimizer.rule.observe(protected.MASK, batch):
        loss = (model(*protected.batch(seed)) - 1).square().mean()
    with optimizer.capture("task"):
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused leaves no trace.


def test_a_refused_wrapping_leaves_the_state_of_the_wrapped_optimizer():
    model = network()
    base = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    base.step()
    before = copy.deepcopy(base.state_dict()["state"])
    with pytest.raises(ValueError, match="drop one"):
        MDGDOptimizer(base, ProtectInputs(model, text_module=model), mask=Magnitude(0.5), compact=True)
    for key, entry in base.state_dict()["state"].items():
        assert_same_bits(list(entry.values()), list(before[key].values()))


def test_a_refused_group_can_be_added_once_it_is_mended():
    held = parameters((3,), (2,))
    optimizer = sgd(held[:1])
    group = {"params": held, "mdgd_align": 3.0}
    with pytest.raises(ValueError, match="more than once"):
        optimizer.add_param_group(group)
    assert group == {"params": held, "mdgd_align": 3.0}
    group["params"] = held[1:]
    for other in (optimizer, sgd(parameters((3,)))):
        other.add_param_group(group)
        assert other.param_groups[1]["mdgd_align"] == 3.0


def test_an_added_group_holds_no_parameter_twice():
    first, other = parameters((3,), (2,))
    optimizer = sgd([first])
    for bad, message in [
        ([other, other], "more than once"),
        ([("one", first)], "more than once"),
        ([nn.Parameter(first.detach())], "parameters 0 and 1 share memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": bad})
    assert len(optimizer.parameters) == len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda o: o.set_gradients(task=[torch.ones(3)]),
        lambda o: o.zero_grad(),
        lambda o: o.discard(),
        lambda o: o.reduce_reference(),
    ],
)
def test_inside_a_capture_nothing_changes_what_is_captured(call):
    optimizer = sgd(parameters((3,)))
    (p,) = optimizer.parameters

    def captures():
        with optimizer.capture("task", scale=4.0):
            call(optimizer)
            (4 * p).sum().backward()

    with pytest.raises(RuntimeError, match=r"leave capture\(\) first"):
        captures()
    assert not optimizer.captured


def test_after_a_skipped_step_a_group_can_be_added():
    optimizer = sgd(parameters((3,)), StepProject())
    optimizer.set_gradients(task=[torch.ones(3)], visual=[None])
    optimizer.combine()
    # As model.zero_grad() does after a gradient scaler has skipped the step.
    optimizer.parameters[0].grad = None
    optimizer.add_param_group({"params": parameters((2,))})
    for p in optimizer.parameters:
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(optimizer.parameters)
    optimizer.step()
    assert_same_bits(optimizer.parameters, [x - 0.1 for x in before])


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_after_a_step_that_chose_no_mask_other_gradients_are_the_wrapped_optimizers(bad):
    optimizer = sgd(parameters((3,)), mask=TopK(0.5))
    (p,) = optimizer.parameters
    rows = [torch.full((3,), bad)]
    optimizer.set_gradients(**dict.fromkeys(KINDS, rows))
    optimizer.combine()
    with pytest.raises(RuntimeError, match="at the step that chooses the mask"):
        optimizer.step()
    # As model.zero_grad() and a backward pass outside any capture.
    before, p.grad = p.detach().clone(), torch.ones(3)
    optimizer.step()
    assert_same_bits([p], [before - 0.1])


def test_whole_numbers_are_no_gradients():
    optimizer = sgd(parameters((3,)))
    with pytest.raises(ValueError, match=r"task gradient of parameter 0 is torch\.int64: not supported"):
        optimizer.set_gradients(task=[torch.arange(3)], visual=[torch.full((3,), 0.5)])
    assert not optimizer.captured


def test_a_missing_visual_gradient_is_told_what_a_step_without_pictures_says():
    optimizer = sgd(parameters((3,)))
    optimizer.set_gradients(task=[torch.ones(3)])
    with pytest.raises(RuntimeError, match=r"visual gradient, not captured: .* set_gradients\(visual=\[None\] \* T\)"):
        optimizer.step()
    optimizer.set_gradients(visual=[None])
    optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# Numbers.


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_given_gradients_are_laid_out_as_their_parameters(layout, settings):
    values = torch.arange(48.0).view(2, 3, 4, 2).sin()
    start = values.to(memory_format=torch.channels_last) if layout == "channels_last" else values.view(6, 8).T
    g = torch.arange(48.0).cos().reshape(start.shape)
    outcomes = []
    for x in (start, start.contiguous()):
        p = nn.Parameter(x.clone())
        optimizer = MDGDOptimizer(torch.optim.AdamW([p], lr=0.1, **settings), MDGD(regularize=0))
        for _ in range(2):
            optimizer.set_gradients(task=[g], visual=[None])
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(p.detach())
    torch.testing.assert_close(*outcomes)


def test_captures_add_to_wider_gradients_that_were_given():
    held = [*parameters((3,)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    optimizer = sgd(held)
    optimizer.set_gradients(task=[torch.ones(3), torch.full((3,), 2.0)], visual=[None, None])
    with optimizer.capture("task"):
        (held[0].sum() + 3 * held[1].float().sum()).backward()
    optimizer.combine()
    assert [p.grad.tolist() for p in held] == [[2.0] * 3, [5.0] * 3]


@pytest.mark.parametrize("state", ["weight decay", "momentum"])
def test_no_step_on_zeros_moves_what_a_compact_mask_has_not_chosen(state):
    (p,) = held = parameters((4,))
    base = torch.optim.SGD(held, lr=0.1, **({"weight_decay": 0.1} if state == "weight decay" else {"momentum": 0.5}))
    if state == "momentum":
        p.grad = torch.ones(4)
        base.step()
    optimizer = MDGDOptimizer(base, MDGD(regularize=0), mask=TopK(0.5), compact=True)
    before = p.detach().clone()
    p.grad = torch.zeros(4)
    with pytest.raises(RuntimeError, match="a step before the mask is chosen would move φ"):
        optimizer.step()
    assert_same_bits([p], [before])


@pytest.mark.parametrize("compact", [False, True])
def test_a_drift_budget_lets_a_step_without_pictures_choose_the_mask(compact):
    optimizer = sgd(parameters((4,)), DriftBudget(MDGD(regularize=0), 0.1), mask=TopK(0.5), compact=compact)
    ones = [torch.ones(4)]
    optimizer.set_gradients(task=ones, visual=[None], reference_task=ones, reference_visual=[None])
    optimizer.combine()
    assert optimizer.parameters[0].grad.tolist() == [1, 1, 0, 0]
    optimizer.step()
    optimizer.zero_grad()
    # With pictures it still asks how far features have moved.
    optimizer.set_gradients(task=ones, visual=ones)
    with pytest.raises(RuntimeError, match="DriftBudget needs the drift"):
        optimizer.step()


def test_a_state_dict_without_a_mask_leaves_the_present_ones_age():
    optimizer = sgd(parameters((4,)), StepProject(), mask=TopK(0.5, refresh=2))
    step(optimizer)
    with pytest.warns(UserWarning, match="no reference"):
        optimizer.load_state_dict(optimizer.base.state_dict())
    step(optimizer, ["task", "visual"])
    assert optimizer.needs() == KINDS

"""LoRA that begins as nothing needs no copy of φ: the reference is the model without it, to the same bits."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD, Anchor, DriftBudget, MDGDOptimizer, Random, mdgd_backward
from torch_mdgd.delta import save_delta

RULES = {
    "align": lambda model: MDGD(2.0, regularize=0),
    "lazy": lambda model: MDGD(2.0, regularize=0, every=2),
    "budget": lambda model: DriftBudget(MDGD(2.0, regularize=0), 0.1),
    "anchor": lambda model: Anchor(model, warmup=1),
    "anchor and align": lambda model: Anchor(model, warmup=1, rule=MDGD(2.0, regularize=0)),
}


def adapted(base_dropout=0.0, **config):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", **config)
    return get_peft_model(llava(dropout=base_dropout).requires_grad_(False), config).train()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def wrapped(model, rule=None, **more):
    return MDGDOptimizer(torch.optim.AdamW(trained(model), lr=0.05), rule or MDGD(2.0, regularize=0), **more)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        mdgd_backward(model, optimizer, llava_batch())
        optimizer.step()
        optimizer.zero_grad()


def held(optimizer):
    """How many numbers of φ a checkpoint has."""
    return sum(entry["mdgd_reference"].numel() for entry in optimizer.state_dict()["state"].values())


@pytest.mark.filterwarnings("ignore:Anchor")
@pytest.mark.parametrize("dropouts", [(0.0, 0.0), (0.2, 0.2)])
@pytest.mark.parametrize("name", RULES)
def test_a_run_without_a_copy_is_the_run_with_one(name, dropouts):
    models = [adapted(dropouts[0], lora_dropout=dropouts[1]) for _ in range(2)]
    optimizers = [wrapped(model, RULES[name](model)) for model in models]
    # What is said to be φ is kept.
    optimizers[1].set_reference()
    values = []
    for model, optimizer in zip(models, optimizers, strict=True):
        torch.manual_seed(3)
        train(model, optimizer)
        values.append([p.detach() for p in trained(model)])
    count = sum(p.numel() for p in trained(models[0]))
    assert [held(optimizer) for optimizer in optimizers] == [0, count]
    assert any(p.any() for p in values[0][1::2])
    for x, y in zip(*values, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_inside_reference_the_model_is_the_one_before_training():
    model = adapted()
    optimizer, before = wrapped(model), copy.deepcopy(model).eval()
    train(model, optimizer)
    values = [p.detach().clone() for p in trained(model)]
    model.eval()
    wanted = before(**llava_batch()).logits
    assert not torch.equal(model(**llava_batch()).logits, wanted)
    for argument in (model, None):
        with optimizer.reference(argument):
            torch.testing.assert_close(model(**llava_batch()).logits, wanted)
    assert_same_bits(trained(model), values)
    assert not optimizer.is_at_reference()


def test_a_resumed_run_is_the_uninterrupted_one():
    model = adapted()
    optimizer = wrapped(model)
    train(model, optimizer, 2)
    state, later = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    train(model, optimizer, 2)
    again = wrapped(later)
    again.load_state_dict(state)
    assert held(again) == 0
    train(later, again, 2)
    assert_same_bits(trained(later), trained(model))


def test_what_was_frozen_stays_frozen():
    model = adapted()
    frozen = [p for name, p in model.named_parameters() if ".layers.0." in name and "lora_" in name]
    for p in frozen:
        p.requires_grad_(False)
    optimizer = wrapped(model)
    train(model, optimizer)
    assert held(optimizer) == 0
    assert not any(p.requires_grad for p in frozen)


def unequal(model):
    with torch.no_grad():
        trained(model)[1].add_(0.1)


def of_two(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=r".*language_model.*o_proj"))


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (lambda: adapted(), {"rule": MDGD()}),
        (lambda: adapted(), {"mask": Random(0.5)}),
        (lambda: adapted(), {"mask": Random(0.5), "compact": True}),
        (lambda: adapted(init_lora_weights="pissa"), {}),
        (lambda: adapted(use_dora=True), {}),
        (lambda: adapted(modules_to_save=["lm_head"]), {}),
        (lambda: adapted(bias="all"), {}),
    ],
)
def test_else_a_copy_is_held(make, more):
    model = make()
    optimizer = wrapped(model, **more)
    assert not optimizer.drop_reference(model)
    train(model, optimizer, 1)
    assert held(optimizer) > 0


@pytest.mark.parametrize("change", [unequal, of_two])
def test_adapters_that_are_not_nothing_are_copied(change):
    model = adapted()
    change(model)
    assert not wrapped(model).drop_reference(model)


def test_what_another_optimizer_trains_is_not_switched_off():
    model = adapted()
    optimizer = MDGDOptimizer(torch.optim.SGD(trained(model)[:2], lr=0.1), MDGD(2.0, regularize=0))
    assert not optimizer.drop_reference(model)


def test_no_gradient_is_taken_where_none_is():
    model = adapted()
    optimizer = wrapped(model)
    assert optimizer.drop_reference(model)
    with (
        optimizer.reference(model),
        pytest.raises(RuntimeError, match="no copy of it is held"),
        optimizer.capture("task"),
    ):
        pass
    for group in optimizer.param_groups:
        group["mdgd_regularize"] = 1.0
    with pytest.raises(RuntimeError, match="regularize above 0"):
        mdgd_backward(model, optimizer, llava_batch())


def test_a_copy_is_made_again_by_set_reference(tmp_path):
    model = adapted()
    optimizer = wrapped(model)
    train(model, optimizer, 1)
    # Where A began is not known.
    with pytest.raises(ValueError, match="save_pretrained of peft"):
        save_delta(model, tmp_path / "delta.safetensors", optimizer)
    assert not any(tmp_path.iterdir())
    optimizer.set_reference()
    values = [p.detach().clone() for p in trained(model)]
    train(model, optimizer, 2)
    assert held(optimizer) == sum(p.numel() for p in values)
    with optimizer.reference(model):
        assert_same_bits(trained(model), values)
    changed = sum(int((p != x).sum()) for p, x in zip(trained(model), values, strict=True))
    assert save_delta(model, tmp_path / "delta.safetensors", optimizer) == changed > 0


def test_a_checkpoint_with_a_copy_loads_into_one_without_and_back():
    models = [adapted() for _ in range(2)]
    optimizers = [wrapped(model) for model in models]
    optimizers[0].set_reference()
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 1)
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    counts = [held(optimizer) for optimizer in optimizers]
    for optimizer, state, count in zip(optimizers, reversed(states), reversed(counts), strict=True):
        optimizer.load_state_dict(state)
        assert held(optimizer) == count

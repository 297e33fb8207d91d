"""A reference that is not where training begins is noticed, and can be set."""

import copy
import warnings

import pytest
import torch
from torch import nn

from torch_mdgd import MDGD, Given, MDGDOptimizer, Project, Random, TopK
from torch_mdgd.rules.base import KINDS

STORAGES = {
    "unmasked": {},
    "dense": {"mask": Random(0.5)},
    "compact": {"mask": Random(0.5), "compact": True},
    "compact, not chosen": {"mask": TopK(0.5), "compact": True},
}
MOVED = r"parameter 0 has changed since the optimizer was wrapped, .* call set_reference\(\)"


def make(storage="unmasked"):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    return model, MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), Project(), **STORAGES[storage])


def load(model):
    model.load_state_dict({name: x + 1 for name, x in model.state_dict().items()})
    return copy.deepcopy(model)


def step(model, optimizer):
    optimizer.set_gradients(**{kind: [torch.ones_like(p) for p in model.parameters()] for kind in KINDS})
    optimizer.step()
    optimizer.zero_grad()


def at_reference(optimizer, model):
    with optimizer.reference():
        return copy.deepcopy(list(model.parameters()))


def same(x, y):
    return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("storage", ["unmasked", "dense", "compact"])
def test_weights_that_were_loaded_after_wrapping_are_noticed_once(storage):
    model, optimizer = make(storage)
    load(model)
    with pytest.warns(UserWarning, match=MOVED):
        at_reference(optimizer, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        at_reference(optimizer, model)


@pytest.mark.parametrize("storage", STORAGES)
def test_set_reference_takes_the_weights_now_and_nothing_is_said(storage):
    model, optimizer = make(storage)
    loaded = load(model)
    optimizer.set_reference()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(at_reference(optimizer, model), loaded.parameters())
        step(model, optimizer)
        assert same(at_reference(optimizer, model), loaded.parameters())
    assert not same(model.parameters(), loaded.parameters())


def test_a_run_that_has_begun_or_was_loaded_is_not_asked():
    model, optimizer = make()
    step(model, optimizer)
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(at_reference(optimizer, model), at_reference(resumed, other))


def test_a_state_dict_without_a_reference_is_noticed():
    # Of a checkpoint of the model alone, or of another optimizer.
    model, optimizer = make()
    plain = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    with pytest.warns(UserWarning, match="the state dict holds no reference"):
        optimizer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("storage", ["unmasked", "dense"])
def test_set_reference_takes_values_and_copies_them(storage):
    model, optimizer = make(storage)
    values = [torch.full_like(p, 0.5) for p in model.parameters()]
    optimizer.set_reference(values)
    assert same(at_reference(optimizer, model), values)
    assert all(bool((x == 0.5).all()) for x in values)
    step(model, optimizer)
    assert same(at_reference(optimizer, model), values)


def test_values_of_another_dtype_are_cast():
    model, optimizer = make()
    optimizer.set_reference([torch.full_like(p, 0.5, dtype=torch.float64) for p in model.parameters()])
    assert all(x.dtype == torch.float32 for x in at_reference(optimizer, model))


def test_compact_values_differ_inside_the_mask_alone():
    p = nn.Parameter(torch.zeros(4))
    mask = Given([torch.tensor([True, True, False, False])])
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.5), mask=mask, compact=True)
    optimizer.set_reference([torch.tensor([1.0, 2.0, 0.0, 0.0])])
    with optimizer.reference():
        assert p.tolist() == [1.0, 2.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="set_reference: value 0 differs from the parameter outside the compact mask"):
        optimizer.set_reference([torch.tensor([5.0, 2.0, 0.0, 3.0])])
    with optimizer.reference():
        assert p.tolist() == [1.0, 2.0, 0.0, 0.0]
    assert not p.any()


def test_nothing_was_changed_where_a_later_value_does_not_fit():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    mask = Given([torch.tensor([True, False])] * 2)
    optimizer = MDGDOptimizer(torch.optim.SGD([p, q], lr=0.5), mask=mask, compact=True)
    with pytest.raises(ValueError, match="value 1 differs"):
        optimizer.set_reference([torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])])
    with optimizer.reference():
        assert p.tolist() == [0.0, 0.0]


def test_before_a_compact_mask_is_chosen_the_reference_is_the_parameters():
    model, optimizer = make("compact, not chosen")
    with pytest.raises(ValueError, match="value 0 differs"):
        optimizer.set_reference([p + 1 for p in model.parameters()])
    optimizer.set_reference([p.detach().clone() for p in model.parameters()])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "set_reference: 0 values for 2 parameters"),
        ([torch.ones(4, 4)], "set_reference: 1 values for 2 parameters"),
        ([torch.ones(4, 4), torch.ones(5)], r"set_reference: value 1 has shape \(5,\), its parameter \(4,\)"),
    ],
)
def test_values_that_do_not_fit_are_named(values, message):
    _, optimizer = make()
    with pytest.raises(ValueError, match=message):
        optimizer.set_reference(values)


def test_it_is_not_set_in_the_middle_of_a_step():
    model, optimizer = make()
    optimizer.set_gradients(task=[torch.ones_like(p) for p in model.parameters()])
    with pytest.raises(RuntimeError, match="set_reference: gradients are captured for this step"):
        optimizer.set_reference()
    optimizer.zero_grad()
    with optimizer.reference(), pytest.raises(RuntimeError, match="set_reference: leave capture"):
        optimizer.set_reference()


def test_the_pull_of_the_regularizer_is_towards_what_was_set():
    # The gradient of half the square at φ is φ. Without v, d = g + (⟨g, g₀⟩ / ⟨g₀, g₀⟩) g₀.
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=1.0), MDGD())
    optimizer.set_reference([torch.tensor([3.0, -1.0])])
    for capture in (optimizer.reference, None):
        with capture() if capture else torch.enable_grad(), optimizer.capture("task"):
            (0.5 * p.square().sum()).backward()
    zeros = [torch.zeros(2)]
    optimizer.set_gradients(visual=zeros, reference_visual=zeros)
    optimizer.combine()
    g, g0 = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    torch.testing.assert_close(p.grad, g + (g @ g0) / (g0 @ g0) * g0)

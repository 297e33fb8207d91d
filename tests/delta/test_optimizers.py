"""One optimizer or several: whoever trains a parameter knows where it began."""

import copy

import pytest
import torch
from torch import nn

from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer, Project
from torch_mdgd.delta import apply_delta, save_delta


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def wrap(parameters, kind=torch.optim.SGD):
    return MDGDOptimizer(kind(parameters, lr=0.5), Project())


def tune(optimizer):
    rows = [torch.ones_like(p) for p in optimizer.parameters]
    optimizer.set_gradients(task=rows, visual=[None] * len(rows))
    optimizer.step()
    optimizer.zero_grad()


def split(model):
    """As the usual recipe of Muon has it."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [wrap(matrices, torch.optim.Muon), wrap([p for p in model.parameters() if p.dim() != 2])]


@pytest.mark.parametrize("as_tuple", [False, True])
def test_several_hold_the_model_together(tmp_path, as_tuple):
    model = make()
    base = copy.deepcopy(model)
    optimizers = split(model)
    for each in optimizers:
        tune(each)
    tuned = copy.deepcopy(model)
    moved = save_delta(model, tmp_path / "d", tuple(optimizers) if as_tuple else optimizers)
    assert moved == sum(p.numel() for p in model.parameters())
    assert_same_bits(list(model.parameters()), list(tuned.parameters()))
    apply_delta(base, tmp_path / "d")
    assert_same_bits(list(base.parameters()), list(model.parameters()))


def test_a_trained_parameter_of_none_is_named(tmp_path):
    model = make()
    first, second = split(model)
    for each in (first, second):
        tune(each)
    with pytest.raises(ValueError, match=r"save_delta: '0\.bias' is trainable and belongs to none .* \(2 such"):
        save_delta(model, tmp_path / "d", first)
    with pytest.raises(ValueError, match=r"save_delta: '0\.weight' is trainable and belongs to none"):
        save_delta(model, tmp_path / "d", [second])
    assert not list(tmp_path.iterdir())
    for p in second.parameters:
        p.requires_grad_(False)
    save_delta(model, tmp_path / "d", first)


def test_one_of_two_is_named(tmp_path):
    model = make()
    with pytest.raises(ValueError, match=r"'0\.weight' belongs to two optimizers"):
        save_delta(model, tmp_path / "d", [wrap(model.parameters()), wrap(model.parameters())])


def test_one_of_another_model_is_named_with_its_optimizer(tmp_path):
    model = make()
    first, second = split(model)
    other = wrap(make().parameters())
    with pytest.raises(ValueError, match="parameter 0 of the optimizer is not one of this model's"):
        save_delta(model, tmp_path / "d", other)
    with pytest.raises(ValueError, match="parameter 0 of optimizer 1 is not one of this model's"):
        save_delta(model, tmp_path / "d", [first, other, second])


def test_what_is_no_mdgd_optimizer_is_named(tmp_path):
    model = make()
    with pytest.raises(TypeError, match="optimizer must be an MDGDOptimizer or several, got SGD"):
        save_delta(model, tmp_path / "d", torch.optim.SGD(model.parameters(), lr=0.5))

"""A ``.grad`` of any layout that no capture took is named, and is stepped on where nothing is captured."""

import pytest
import torch
from torch import nn

from tests.properties import assert_same_bits
from torch_mdgd import Given, MDGDOptimizer, Project

STRAY = r"parameter 0 already has a gradient, which no capture took"


def embedding(kind=torch.optim.SGD, **settings):
    torch.manual_seed(0)
    model = nn.Embedding(6, 3, sparse=True)
    return model, MDGDOptimizer(kind(model.parameters(), lr=0.5), Project(), **settings)


def backward(model):
    model(torch.tensor([1, 4, 1])).square().sum().backward()


def test_a_stray_sparse_gradient_is_named():
    model, optimizer = embedding()
    backward(model)
    assert model.weight.grad.is_sparse
    with pytest.raises(RuntimeError, match=STRAY), optimizer.capture("task"):
        pass
    with pytest.raises(RuntimeError, match=STRAY):
        optimizer.set_gradients(task=[torch.ones(6, 3)])
    optimizer.zero_grad()
    optimizer.set_gradients(task=[torch.ones(6, 3)], visual=[None])
    optimizer.step()


def test_a_sparse_gradient_is_not_captured():
    model, optimizer = embedding()
    with pytest.raises(ValueError, match="task gradient of parameter 0 is sparse"), optimizer.capture("task"):
        backward(model)
    with pytest.raises(ValueError, match="task gradient of parameter 0 is sparse: not supported"):
        optimizer.set_gradients(task=[torch.ones(6, 3).to_sparse()])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad])
def test_a_plain_step_on_it_is_the_bare_optimizers(kind):
    model, optimizer = embedding(kind)
    bare, _ = embedding(kind)
    plain = kind(bare.parameters(), lr=0.5)
    for _ in range(2):
        for each, steps in ((model, optimizer), (bare, plain)):
            backward(each)
            steps.step()
            steps.zero_grad()
    assert_same_bits([model.weight], [bare.weight])


def test_under_a_mask_a_plain_step_on_it_moves_the_masks_elements():
    mask = torch.arange(18).view(6, 3) % 2 == 0
    model, optimizer = embedding(mask=Given([mask]))
    before = model.weight.detach().clone()
    backward(model)
    optimizer.step()
    touched = torch.zeros(6, 3, dtype=torch.bool)
    touched[[1, 4]] = True
    assert torch.equal(model.weight != before, mask & touched)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zeros_that_zero_grad_has_left_are_nobodys(set_to_none):
    p = nn.Parameter(torch.ones(2))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.5), Project())
    p.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.set_gradients(task=[torch.ones(2)], visual=[None])
    optimizer.step()
    assert p.tolist() == [0.5, 0.5]

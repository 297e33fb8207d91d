"""State that cannot begin at zero does not go with a mask that is chosen anew."""

import pytest
import torch
from torch import nn

from torch_mdgd import MDGDOptimizer, Random, TopK

REFUSED = [torch.optim.Rprop, torch.optim.ASGD]


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_by_name(kind):
    base = kind([nn.Parameter(torch.ones(4))], lr=0.1)
    with pytest.raises(TypeError, match=f"{kind.__name__} keeps state that cannot begin at zero .* refresh"):
        MDGDOptimizer(base, mask=TopK(0.5, refresh=1))
    MDGDOptimizer(base, mask=TopK(0.5))
    MDGDOptimizer(base)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_an_element_that_comes_in_anew_moves_as_in_a_fresh_optimizer(kind):
    def settings(kind):
        return {"momentum": 0.5} if kind is torch.optim.SGD else {}

    p = nn.Parameter(torch.ones(4))
    optimizer = MDGDOptimizer(kind([p], lr=0.125, **settings(kind)), mask=TopK(0.5, refresh=1))
    for g in ([4.0, 3.0, 0.5, 0.5], [0.5, 0.5, 3.0, 4.0]):
        before = p.detach().clone()
        given = [torch.tensor(g)]
        optimizer.set_gradients(task=given, visual=[None], reference_task=given, reference_visual=[None])
        optimizer.step()
        optimizer.zero_grad()
    assert (p != before).tolist() == [False, False, True, True]
    assert all(not x[:2].any() for x in optimizer.state[p].values() if x.dim())


def test_what_weight_decay_left_outside_the_earlier_mask_does_not_move_it():
    p = nn.Parameter(torch.ones(4))
    base = torch.optim.SGD([p], lr=0.125, momentum=0.5, weight_decay=0.25)
    optimizer = MDGDOptimizer(base, mask=TopK(0.5, refresh=1))
    for g in ([4.0, 3.0, 0.5, 0.5], [0.5, 0.5, 3.0, 4.0]):
        given = [torch.tensor(g)]
        optimizer.set_gradients(task=given, visual=[None], reference_task=given, reference_visual=[None])
        optimizer.step()
        optimizer.zero_grad()
    assert p[2:].tolist() == [1 - 0.125 * (g + 0.25) for g in (3.0, 4.0)]


@pytest.mark.parametrize("kind", REFUSED)
def test_one_mask_for_good_is_taken(kind):
    p = nn.Parameter(torch.ones(4))
    optimizer = MDGDOptimizer(kind([p], lr=0.125), mask=Random(0.5))
    optimizer.set_gradients(task=[torch.ones(4)], visual=[None], reference_task=[None], reference_visual=[None])
    optimizer.step()
    assert int((p != 1).sum()) == 2

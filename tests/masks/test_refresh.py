"""A mask that is chosen anew every so many steps."""

import copy

import torch
from torch import nn

from torch_mdgd import MDGD, MDGDOptimizer, TopK
from torch_mdgd.rules.base import KINDS


def normal(step):
    return [torch.randn(30, generator=torch.Generator().manual_seed(step))]


def test_a_refreshed_mask_follows_the_gradients_of_its_step_and_needs_the_reference_only_then():
    parameters = [nn.Parameter(torch.randn(30))]
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), mask=TopK(0.2, refresh=3))
    zeros = [torch.zeros(30)]
    for step in range(7):
        g = normal(step)
        choosing = step % 3 == 0
        assert (optimizer.needs() == KINDS) == choosing
        before = parameters[0].detach().clone()
        if choosing:
            optimizer.set_gradients(task=g, visual=zeros, reference_task=g, reference_visual=zeros)
            wanted = set(g[0].abs().topk(6).indices.tolist())
        else:
            optimizer.set_gradients(task=g, visual=zeros)
        optimizer.step()
        optimizer.zero_grad()
        assert set((parameters[0] != before).nonzero().flatten().tolist()) == wanted


def step(optimizer, g):
    """A step without a visual gradient, and with as much of the reference as is needed."""
    none = [None] * len(optimizer.parameters)
    given = {"task": g, "visual": none, "reference_task": g, "reference_visual": none}
    optimizer.set_gradients(**{kind: given[kind] for kind in optimizer.needs()})
    optimizer.step()
    optimizer.zero_grad()


def test_a_state_dict_tells_how_old_the_mask_is():
    def build(p):
        return MDGDOptimizer(torch.optim.SGD([p], lr=0.1), mask=TopK(0.2, refresh=3))

    p = nn.Parameter(torch.zeros(30))
    optimizer = build(p)
    for number in range(2):
        step(optimizer, normal(number))
    resumed = build(nn.Parameter(p.detach().clone()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o in (optimizer, resumed):
        asked = []
        for number in range(2, 5):
            asked.append(o.needs() == KINDS)
            step(o, normal(number))
        assert asked == [False, True, False]
    assert torch.equal(resumed.parameters[0], p)


def test_what_the_wrapped_optimizer_holds_of_an_element_that_comes_in_anew_begins_at_zero():
    p = nn.Parameter(torch.zeros(2))
    base = torch.optim.SGD([p], lr=1.0, momentum=0.5)
    optimizer = MDGDOptimizer(base, MDGD(regularize=0), mask=TopK(0.5, refresh=1))
    for g in ([4.0, 1.0], [1.0, 4.0], [4.0, 1.0], [4.0, 1.0]):
        step(optimizer, [torch.tensor(g)])
    # The first element moves in steps 1, 3 and 4, and what it was moved by in step 1 is forgotten in step 3.
    assert p.tolist() == [-4.0 - 4.0 - (4.0 + 2.0), -4.0]

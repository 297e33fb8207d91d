"""A batch without labels chooses no mask: its gradient is zero, and all scores would tie."""

import copy

import pytest
import torch
from torch import nn

from torch_mdgd import MDGD, MDGDOptimizer, Project, StepProject, TopK
from torch_mdgd.rules.base import KINDS

EMPTY = {"zeros": lambda: [torch.zeros(40)], "none": lambda: [None]}


def normal(seed):
    return torch.randn(40, generator=torch.Generator().manual_seed(seed))


def make(compact, rule=MDGD):
    p = nn.Parameter(torch.zeros(40))
    return p, MDGDOptimizer(torch.optim.SGD([p], lr=0.5), rule(), mask=TopK(0.25), compact=compact)


@pytest.mark.parametrize("rule", [MDGD, Project, StepProject])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("empty", EMPTY)
def test_the_next_batch_chooses_the_mask(empty, compact, rule):
    given = {kind: [normal(i)] for i, kind in enumerate(KINDS)}
    outcomes = []
    for first in (False, True):
        p, optimizer = make(compact, rule)
        if first:
            nothing = EMPTY[empty]()
            optimizer.set_gradients(**{**given, "task": nothing, "reference_task": nothing})
            with pytest.raises(RuntimeError, match="the task gradient is zero at the step that chooses the mask"):
                optimizer.step()
            assert not p.any()
            assert "kept_fraction" not in optimizer.diagnostics
            optimizer.zero_grad()
        optimizer.set_gradients(**copy.deepcopy(given))
        optimizer.step()
        outcomes.append(p.detach())
    assert torch.equal(*outcomes)
    assert int((p != 0).sum()) == 10


def test_a_later_choice_waits_too():
    p = nn.Parameter(torch.zeros(40))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.5), Project(), mask=TopK(0.25, refresh=1))
    optimizer.set_gradients(**{kind: [normal(0)] for kind in optimizer.needs()})
    optimizer.step()
    optimizer.zero_grad()
    optimizer.set_gradients(**{key: [torch.zeros(40)] for key in optimizer.needs()})
    with pytest.raises(RuntimeError, match="is zero at the step that chooses the mask"):
        optimizer.step()


def test_a_mask_that_is_there_takes_a_zero_gradient():
    p, optimizer = make(compact=False)
    optimizer.set_gradients(**{kind: [normal(i)] for i, kind in enumerate(KINDS)})
    optimizer.step()
    optimizer.zero_grad()
    before = p.detach().clone()
    optimizer.set_gradients(**{key: [torch.zeros(40)] for key in KINDS})
    optimizer.step()
    assert torch.equal(p, before)

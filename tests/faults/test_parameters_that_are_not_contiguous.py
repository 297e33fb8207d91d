"""Parameters in channels_last, transposed or of no elements, with deterministic algorithms or without."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from tests.faults.test_c05_c13_our_arithmetic_obeys_no_setting import deterministic
from torch_mdgd import MDGDOptimizer, Project, Random, StepProject

LAYOUTS = {
    "contiguous": lambda: torch.randn(4, 3, 2, 2),
    "channels_last": lambda: torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(6, 8).T,
    "every other": lambda: torch.randn(48, 2)[:, 0],
    "expanded in storage": lambda: torch.randn(100)[4:52].view(6, 8),
}


def outcome(layout, rule, compact, settings):
    torch.manual_seed(0)
    p, q = nn.Parameter(LAYOUTS[layout]()), nn.Parameter(torch.ones(0, 3))
    assert layout in ("contiguous", "expanded in storage") or not p.is_contiguous()
    start = p.detach().clone()
    with settings():
        optimizer = MDGDOptimizer(torch.optim.AdamW([p, q], lr=0.125), rule(), mask=Random(0.5), compact=compact)
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            kinds = {kind: [torch.randn(p.shape, generator=generator), torch.ones(0, 3)] for kind in optimizer.needs()}
            optimizer.set_gradients(**kinds)
            optimizer.step()
            optimizer.zero_grad()
            with optimizer.reference():
                assert torch.equal(p, start)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert int((p != start).sum()) == 24
    return p.detach()


@pytest.mark.parametrize("rule", [Project, StepProject])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_give_the_same_numbers(layout, rule):
    wanted = outcome(layout, rule, False, contextlib.nullcontext)
    for compact in (False, True):
        torch.testing.assert_close(outcome(layout, rule, compact, deterministic), wanted)
    torch.testing.assert_close(outcome(layout, rule, True, contextlib.nullcontext), wanted)

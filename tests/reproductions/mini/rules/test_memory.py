"""How visual gradients are kept: in full or as factors, of parameters of any layout and precision."""

import torch

from reproductions.mini.rules import History
from reproductions.mini.rules.memory import Factors, Rows, remember
from torch_mdgd import MDGDOptimizer


def test_low_precision_and_other_layouts_lose_only_their_rounding():
    generator = torch.Generator().manual_seed(0)
    values, *drawn = torch.randn(7, 6, 5, generator=generator, dtype=torch.float64)
    moved = {}
    for name, p in {
        "exact": values.clone(),
        "transposed": values.T.contiguous().T,
        "low": values.bfloat16(),
    }.items():
        parameter = torch.nn.Parameter(p)
        optimizer = MDGDOptimizer(torch.optim.SGD([parameter], lr=1.0), History(4))
        for g, v in zip(drawn[:3], drawn[3:], strict=True):
            optimizer.set_gradients(task=[g.to(p.dtype)], visual=[v.to(p.dtype)])
            optimizer.step()
            optimizer.zero_grad()
        moved[name] = parameter.detach().double() - values
    assert torch.allclose(moved["transposed"], moved["exact"], rtol=0, atol=1e-12)
    size = moved["exact"].abs().max()
    assert (moved["low"] - moved["exact"]).abs().max() < 0.1 * size


def test_what_factors_would_not_shorten_is_kept_in_full():
    kinds = {shape: type(remember(torch.zeros(shape), 3, False)) for shape in ((2, 2), (1, 9), (3, 2), (4, 4))}
    assert kinds == {
        (2, 2): Rows, (1, 9): Rows, (3, 2): Factors, (4, 4): Factors,
    }  # fmt: skip


def test_a_gradient_that_the_iteration_does_not_see_is_stored_as_nothing():
    memory = remember(torch.zeros(4, 5), 2, False)
    memory.left[0], memory.right[0] = 1, 1
    memory.store_(0, torch.zeros(4, 5), torch.tensor(1.0), torch.tensor(True))
    assert not memory.left[0].any()
    assert not memory.right[0].any()

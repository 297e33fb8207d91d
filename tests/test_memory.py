"""How many buffers of the size of the parameters are alive at once."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_mdgd import MDGD, MDGDOptimizer, Project, StepProject, TopK
from torch_mdgd.rules.base import KINDS

# Well above the fixed scratch of the kernels.
N = 1 << 22


class LiveBuffers(TorchDispatchMode):
    """Counts storages of at least ``N`` float32 numbers among the results of every operation; keeps the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= 4 * N:
                key = x.untyped_storage()._cdata
                # A result in an argument's storage is not new: parameters, φ and data stay out of the count.
                if key in self.alive or key not in known:
                    self.alive[key] = StorageWeakRef(x.untyped_storage())
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, len(self.alive))
        return out


def passes(optimizer, p, data):
    for kind, x in zip(("visual", "task"), data, strict=True):
        with optimizer.capture(kind):
            (p @ x).backward()


def test_the_watch_counts_live_buffers():
    with LiveBuffers() as live:
        a = torch.ones(N)
        b = a + 1
        del a
        b = b.add_(1).view(2, -1)
        c = b * 2
    assert (live.peak, len(live.alive)) == (2, 2)
    assert c.numel() == b.numel()


@pytest.mark.parametrize(
    ("settings", "captured", "combined", "left"),
    [
        # g, v and g~0; d takes the place of g, and nothing else is left.
        ({}, 3, 3, 1),
        ({"rule": MDGD(regularize=0)}, 2, 2, 1),
        ({"rule": Project()}, 2, 2, 1),
        # v is kept for the move.
        ({"rule": StepProject()}, 2, 2, 2),
    ],
)
def test_gradient_sized_buffers(settings, captured, combined, left):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(N))
    data = [torch.randn(N) for _ in range(4)]
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.1), **settings)
    with LiveBuffers() as live:
        if optimizer.needs() == KINDS:
            with optimizer.reference():
                passes(optimizer, p, data[2:])
            optimizer.reduce_reference()
        passes(optimizer, p, data[:2])
        assert live.peak <= captured
        live.peak = 0
        optimizer.combine()
        assert live.peak <= combined
        live.peak = 0
        torch.zeros(1)
        assert live.peak == left
        optimizer.step()
        # With a correction also the parameters' values before the step.
        assert live.peak <= left + (isinstance(settings.get("rule"), StepProject))
        optimizer.zero_grad()
        torch.zeros(1)
        assert len(live.alive) == 0


def test_an_exchange_with_the_reference_takes_no_buffer():
    p = torch.nn.Parameter(torch.randn(N))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.1))
    with torch.no_grad():
        p.add_(1)
    now = p.detach().clone()
    with LiveBuffers() as live, optimizer.reference():
        pass
    assert live.peak == 0
    assert torch.equal(p, now)


def test_a_skipped_step_leaves_no_buffers_to_the_next():
    p = torch.nn.Parameter(torch.randn(N))
    data = [torch.randn(N) for _ in range(2)]
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.1), StepProject())
    with LiveBuffers() as live:
        passes(optimizer, p, data)
        optimizer.combine()
        # As when a gradient scaler has found an Inf: no step, and the model's zero_grad.
        p.grad = None
        live.peak = 0
        passes(optimizer, p, data)
        assert live.peak <= 2


def test_a_visual_gradient_that_is_zero_is_let_go_before_the_mask_is_chosen():
    p = torch.nn.Parameter(torch.randn(N))
    data = torch.randn(N)
    seen = []

    class Watched(TopK):
        def choose(self, parameters, gradients):
            masks = super().choose(parameters, gradients)
            torch.zeros(1)
            seen.append(len(live.alive))
            return masks

    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.1), mask=Watched(0.1), compact=True)
    with LiveBuffers() as live:
        with optimizer.reference():
            passes(optimizer, p, [torch.zeros(N), data])
        optimizer.reduce_reference()
        passes(optimizer, p, [torch.zeros(N), data])
        optimizer.step()
    # g and g~0.
    assert seen == [2]
    (positions,) = optimizer._storage.positions
    assert torch.equal(positions.long(), data.abs().topk(round(0.1 * N)).indices.sort().values)

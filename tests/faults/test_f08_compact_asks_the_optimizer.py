"""Compact storage and the dense one give the same numbers, or the optimizer is refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from tests.faults.optimizers import ClippedMoves, Counting, Lamb, MatricesOnly, RowWise, ScheduleFree
from torch_mdgd import Given, MDGDOptimizer, Project, TopK

SHAPES = [(6, 5), (7,), (3, 2, 2)]
TORCH = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind not in (Optimizer, torch.optim.LBFGS)
}
OWN = {kind.__name__: kind for kind in (Lamb, RowWise, ClippedMoves, MatricesOnly, Counting, ScheduleFree)}
REFUSED = {"Adafactor", "Muon", "Lamb", "RowWise", "ClippedMoves", "MatricesOnly", "SparseAdam"}


def parameters_of():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def make(kind, parameters):
    return kind(parameters[:1] if kind in (torch.optim.Muon, MatricesOnly) else parameters, lr=0.0625)


@pytest.mark.parametrize("name", [*TORCH, *OWN])
def test_it_is_refused_by_name_or_both_give_the_same_numbers(name):
    kind = {**TORCH, **OWN}[name]
    outcomes = []
    for compact in (False, True):
        parameters = parameters_of()
        base = make(kind, parameters)
        parameters = base.param_groups[0]["params"]
        mask = Given([torch.arange(p.numel()).view_as(p) % 3 == 0 for p in parameters])
        if compact and name in REFUSED:
            with pytest.raises(TypeError, match=rf"compact=True .*{name}.* use compact=False, the dense mode"):
                MDGDOptimizer(base, Project(), mask=mask, compact=True)
            return
        optimizer = MDGDOptimizer(base, Project(), mask=mask, compact=compact)
        if hasattr(optimizer, "train"):
            optimizer.train()
        if name == "SparseAdam":
            # It takes no dense gradient, and has none to combine.
            continue
        for seed in range(4):
            generator = torch.Generator().manual_seed(10 + seed)
            g = [torch.randn(p.shape, generator=generator) for p in parameters]
            optimizer.set_gradients(task=g, visual=[None] * len(g))
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append([p.detach() for p in parameters])
    for dense, compact_ in zip(*outcomes, strict=True):
        torch.testing.assert_close(compact_, dense, rtol=1e-5, atol=1e-6)


LIBRARIES = {
    "Adafactor": lambda p: pytest.importorskip("transformers.optimization").Adafactor(
        p, lr=1e-2, relative_step=False, scale_parameter=False
    ),
    **{
        name: lambda p, name=name: getattr(pytest.importorskip("pytorch_optimizer"), name)(p, lr=1e-2)
        for name in ("Lamb", "LARS", "StableAdamW", "CAME", "SOAP")
    },
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_those_of_other_libraries_that_look_at_whole_parameters_are_refused(name):
    base = LIBRARIES[name](parameters_of())
    mask = Given([torch.ones(shape, dtype=torch.bool) for shape in SHAPES])
    with pytest.raises(TypeError, match=rf"compact=True .*{name}.* use compact=False, the dense mode"):
        MDGDOptimizer(base, mask=mask, compact=True)
    MDGDOptimizer(base, mask=mask)


@pytest.mark.parametrize("name", ["AdaBelief", "Lion", "Lamb"])
def test_those_of_other_libraries_that_are_elementwise_are_taken(name):
    library = pytest.importorskip("pytorch_optimizer")
    base = getattr(library, name)(parameters_of(), lr=1e-2)
    mask = Given([torch.ones(shape, dtype=torch.bool) for shape in SHAPES])
    if name == "Lamb":
        with pytest.raises(TypeError, match="alike and apart"):
            MDGDOptimizer(base, mask=mask, compact=True)
    else:
        MDGDOptimizer(base, mask=mask, compact=True)


@pytest.mark.parametrize("name", [name for name in [*TORCH, *OWN] if name not in REFUSED])
def test_the_question_leaves_no_trace(name):
    kind = {**TORCH, **OWN}[name]
    parameters = parameters_of()
    base = make(kind, parameters)
    called = []
    base.register_step_pre_hook(lambda *args: called.append(args))
    before = copy.deepcopy((parameters, base.state_dict(), torch.get_rng_state()))
    MDGDOptimizer(base, Project(), mask=TopK(0.5), compact=True)
    after = parameters, base.state_dict(), torch.get_rng_state()
    assert all(torch.equal(x, y) for x, y in zip(before[0], after[0], strict=True))
    assert repr(before[1]["state"]) == repr(after[1]["state"])
    assert torch.equal(before[2], after[2])
    assert not called


class Noting(torch.optim.SGD):
    """Has attributes of its own, and notes down what it does; makes a tensor on the default device."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.factor, self.notes, self.count = 0.5, [], {}

    def step(self, closure=None):
        self.notes.append(len(self.notes))
        self.count["steps"] = self.count.get("steps", 0) + 1
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad * (self.factor * torch.ones(()))
        return super().step(closure)


def test_an_optimizer_with_attributes_of_its_own_is_asked_and_notes_nothing():
    p = nn.Parameter(torch.ones(4))
    base = Noting([p], lr=0.5)
    optimizer = MDGDOptimizer(base, Project(), mask=Given([torch.ones(4) > 0]), compact=True)
    assert (base.notes, base.count) == ([], {})
    optimizer.set_gradients(task=[torch.ones(4)], visual=[None])
    optimizer.step()
    assert p.tolist() == [0.75] * 4
    assert (base.notes, base.count) == ([0], {"steps": 1})


def test_the_question_is_asked_on_the_parameters_device():
    # As a script does that makes everything inside a device's context.
    p = nn.Parameter(torch.ones(4))
    mask = Given([torch.ones(4, dtype=torch.bool)])
    with torch.device("meta"):
        optimizer = MDGDOptimizer(Noting([p], lr=0.5), Project(), mask=mask, compact=True)
    optimizer.set_gradients(task=[torch.ones(4)], visual=[None])
    optimizer.step()
    assert not (p == 1).any()


def test_each_group_is_asked():
    p, q = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))

    class ByGroup(torch.optim.SGD):
        """Muon for one group, SGD for the other."""

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for x in group["params"]:
                    scale = x.norm() if group["whole"] else 1
                    x.sub_(x.grad * scale, alpha=group["lr"])

    base = ByGroup([{"params": [q], "whole": False}, {"params": [p], "whole": True}], lr=0.5)
    with pytest.raises(TypeError, match="ByGroup"):
        MDGDOptimizer(base, mask=Given([torch.ones(4) > 0, torch.ones(4, 4) > 0]), compact=True)

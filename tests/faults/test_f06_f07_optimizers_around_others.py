"""What cannot be a base says so when it is wrapped, and what to do instead."""

import pytest
import torch
from torch import nn

from tests.faults.optimizers import Nested, TwoPhases
from torch_mdgd import MDGDOptimizer

NESTED = r"Nested is an optimizer around another, .* \['base_optimizer', 'lookahead_state'\] .* wrap the inner"
KINDS = {
    "Nested": (lambda p: Nested(p, lr=0.1), NESTED),
    "TwoPhases": (lambda p: TwoPhases(p, lr=0.1), "TwoPhases evaluates its closure several times"),
    "LBFGS": (torch.optim.LBFGS, "LBFGS evaluates its closure several times"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_when_it_is_wrapped_and_stays_as_it_was(kind):
    make, message = KINDS[kind]
    p = nn.Parameter(torch.ones(2))
    base = make([p])
    before = {key: value for key, value in base.param_groups[0].items() if key != "params"}
    with pytest.raises(TypeError, match=message):
        MDGDOptimizer(base)
    assert {key: value for key, value in base.param_groups[0].items() if key != "params"} == before
    assert not base.state


@pytest.mark.parametrize("name", ["SAM", "WSAM", "BSAM", "Lookahead", "ScheduleFreeWrapper"])
def test_those_of_pytorch_optimizer_are_refused(name):
    library = pytest.importorskip("pytorch_optimizer")
    p = nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([p], lr=0.1)
    model = nn.Linear(2, 2)
    kinds = {
        "SAM": lambda: library.SAM([p], torch.optim.SGD, lr=0.1),
        "WSAM": lambda: library.WSAM(model, [p], torch.optim.SGD, lr=0.1),
        "BSAM": lambda: library.BSAM([p], num_data=8, lr=0.1),
        "Lookahead": lambda: library.Lookahead(inner),
        "ScheduleFreeWrapper": lambda: library.ScheduleFreeWrapper(inner),
    }
    base = kinds[name]()
    refused = f"{name} (evaluates its closure|is an optimizer around another)"
    if not isinstance(base, torch.optim.Optimizer):
        refused = f"must be a torch.optim.Optimizer, got {name}"
    with pytest.raises(TypeError, match=refused):
        MDGDOptimizer(base)

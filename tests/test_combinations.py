"""Every rule with every mask, dense and compact, trains, resumes and is copied bit for bit, or is refused."""

import copy

import pytest
import torch

from tests.networks import network, train_step
from tests.properties import assert_same_bits
from tests.rules.contract import copies
from torch_mdgd import (
    MDGD,
    DriftBudget,
    Given,
    Magnitude,
    MDGDOptimizer,
    Project,
    ProtectInputs,
    Random,
    StepProject,
    TopK,
)

SHAPES = [p.shape for p in network().parameters()]
RULES = {
    "MDGD": lambda model: MDGD(),
    "without regularizer": lambda model: MDGD(regularize=0),
    "Project": lambda model: Project(0.5),
    "StepProject": lambda model: StepProject(),
    "restoring": lambda model: StepProject(0.1),
    "ProtectInputs": lambda model: ProtectInputs(model, 0.5, refresh=2, text_module=model),
    "budget of MDGD": lambda model: DriftBudget(MDGD(), 0.1),
    "budget of Project": lambda model: DriftBudget(Project(), 0.1),
}
MASKS = {
    "none": None,
    "TopK": TopK(0.5),
    # Chosen at the first and the third step.
    "refreshed": TopK(0.5, refresh=2),
    "Magnitude": Magnitude(0.5),
    "Random": Random(0.5),
    "Given": Given([torch.arange(s.numel()).view(s) % 3 > 0 for s in SHAPES]),
}
# Which exclude each other: what the error has to name, and when.
EXCLUDED = [
    ("compact=True keeps the elements inside a mask", lambda rule, mask, compact: compact and mask == "none"),
    ("compact=True keeps one mask", lambda rule, mask, compact: compact and mask == "refreshed"),
    ("ProtectInputs .* mask: drop one", lambda rule, mask, compact: rule == "ProtectInputs" and mask != "none"),
]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("rule", RULES)
def test_it_works_or_is_refused(rule, mask, compact):
    def wrap(model):
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        return MDGDOptimizer(base, RULES[rule](model), mask=MASKS[mask], compact=compact)

    reasons = [names for names, applies in EXCLUDED if applies(rule, mask, compact)]
    if reasons:
        with pytest.raises(ValueError, match="|".join(reasons)):
            wrap(network())
        return
    model = network()
    start = copy.deepcopy(list(model.parameters()))
    optimizer = wrap(model)
    # As accelerate's prepare does.
    optimizer.load_state_dict(optimizer.state_dict())
    for number in (1, 2):
        train_step(model, optimizer, number)
    others = copies(model, optimizer, wrap)
    train_step(model, optimizer, 3)
    assert not any(torch.equal(p, x) for p, x in zip(model.parameters(), start, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())
    for other, its_optimizer in others:
        train_step(other, its_optimizer, 3)
        assert_same_bits(list(other.parameters()), list(model.parameters()))

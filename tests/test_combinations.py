"""Every combination of options trains, resumes and is copied bit for bit, or is refused by the names of two."""

import copy
import itertools
import pickle
from contextlib import nullcontext

import pytest
import torch

from tests.networks import network
from tests.properties import assert_same_bits
from torch_mdgd import Given, MDGDOptimizer, Random, TopK, VisualInputs

SHAPES = [p.shape for p in network().parameters()]
MASKS = {
    "none": None,
    # Chosen at the first and the third step.
    "TopK": TopK(0.5, refresh=2),
    "Random": Random(0.5),
    "Given": Given([torch.arange(s.numel()).view(s) % 3 > 0 for s in SHAPES]),
}
OPTIONS = {
    "update": ["regularize", "reference", "project"],
    "scope": ["tensor", "global"],
    "history": [1, 2],
    "restore": [0.0, 0.1],
    "protect": [False, True],
    "drift_budget": [None, 0.1],
    # Of three steps one takes the gradients at φ.
    "reference_every": [1, 3],
}
# Which exclude each other: the names that the error has to hold, and when.
EXCLUDED = [
    (("compact", "mask"), lambda o: o["compact"] and not o["mask"]),
    (("space", "update"), lambda o: o["space"] == "step" and o["update"] != "project"),
    (("history", "space"), lambda o: o["history"] > 1 and o["space"] == "gradient"),
    (("restore", "space"), lambda o: o["restore"] and o["space"] == "gradient"),
    (("drift_budget", "space"), lambda o: o["drift_budget"] and o["space"] == "step"),
    (("protect", "space"), lambda o: o["protect"] and o["space"] == "gradient"),
    (("protect", "mask"), lambda o: o["protect"] and o["mask"]),
    (("protect", "history"), lambda o: o["protect"] and o["history"] > 1),
    (("protect", "restore"), lambda o: o["protect"] and o["restore"]),
    (("protect", "scope"), lambda o: o["protect"] and o["scope"] == "global"),
    (("reference_every", "update"), lambda o: o["reference_every"] > 1 and o["update"] == "project"),
    (
        ("reference_every", "mask"),
        lambda o: o["reference_every"] > 1 and o["mask"] and o["update"] == "regularize",
    ),
]


def wrap(model, options):
    protect = VisualInputs(model, 0.5, refresh=2, text_module=model) if options["protect"] else None
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    return MDGDOptimizer(base, **{**options, "protect": protect})


def losses(model, number):
    """A visual and a task loss on the data of this step: what is remembered of another step is another."""
    x = torch.sin(number * torch.arange(24, dtype=torch.float64)).view(6, 4)
    return {"visual": (model[0](x) - 0.1).square().mean(), "task": (model(x) - 1).square().mean()}


def capture(model, optimizer, number, roles):
    for role, loss in losses(model, number).items():
        if role in roles:
            with optimizer.capture(role):
                loss.backward()


def train_step(model, optimizer, number):
    roles = optimizer.required_roles
    if "reference_task" in roles:
        with optimizer.reference():
            capture(model, optimizer, number, roles)
    with nullcontext() if optimizer.inputs is None else optimizer.inputs.observe(torch.arange(6) < 4):
        capture(model, optimizer, number, roles)
    optimizer.observe_drift(torch.tensor([0.1 * number, 1.0], dtype=torch.float64))
    optimizer.step()
    optimizer.zero_grad()


def resumed(model, optimizer, options):
    """The same run in another process, as far as that can tell: from weights and a state dict."""
    other = network()
    fresh = wrap(other, options)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, fresh


def check(options):
    model = network()
    start = copy.deepcopy(list(model.parameters()))
    optimizer = wrap(model, options)
    # As accelerate's prepare does.
    optimizer.load_state_dict(optimizer.state_dict())
    for number in (1, 2):
        train_step(model, optimizer, number)
    runs = [
        resumed(model, optimizer, options),
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ]
    train_step(model, optimizer, 3)
    assert not any(torch.equal(p, x) for p, x in zip(model.parameters(), start, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())
    for other, its_optimizer in runs:
        train_step(other, its_optimizer, 3)
        assert_same_bits(list(other.parameters()), list(model.parameters()))


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("space", ["gradient", "step"])
def test_it_works_or_is_refused(space, mask, compact):
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True), space=space, mask=MASKS[mask], compact=compact)
        excluded = [names for names, applies in EXCLUDED if applies(options)]
        try:
            if not excluded:
                check(options)
            elif len(excluded) < 3:
                message = "|".join("".join(f"(?=.*{name})" for name in names) for names in excluded)
                with pytest.raises(ValueError, match=message):
                    wrap(network(), options)
        except Exception as error:
            raise AssertionError(f"with {options}") from error

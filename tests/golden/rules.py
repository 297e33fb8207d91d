"""The rules that the golden runs go through, and how each is built."""

from typing import Any

import torch
from torch import nn

from tests.distributed.setups import whole
from torch_mdgd import Given, Magnitude, MDGDOptimizer, Random, TopK, VisualInputs

STEP = {"update": "project", "space": "step"}
PLAIN: dict[str, dict[str, Any]] = {
    "published": {},
    "weighted": {"align": 0.3, "regularize": 2.0},
    "align": {"align": 3.0, "regularize": 0.0},
    "no align": {"align": 0.0},
    "project": {"update": "project", "align": 0.5},
    "step": STEP,
    "step, restored": {**STEP, "restore": 0.1},
}
MASKED: dict[str, dict[str, Any]] = {
    "top": {"mask": TopK(0.3)},
    "random": {"mask": Random(0.3, seed=1), "regularize": 0.0},
    "magnitude": {"mask": Magnitude(0.3)},
    "masked project": {"mask": TopK(0.3), "update": "project"},
    "masked step": {"mask": TopK(0.3), **STEP, "restore": 0.1},
}
COMPACT = {f"{name}, compact": {**form, "compact": True} for name, form in MASKED.items()}
REFRESHED = {"top, refreshed": {"mask": TopK(0.3, refresh=2)}}
BUDGETED: dict[str, dict[str, Any]] = {
    "budget": {"drift_budget": 0.1},
    "budget, project": {"drift_budget": 0.1, "update": "project"},
    "budget, top, compact": {"drift_budget": 0.1, "mask": TopK(0.3), "compact": True},
}
INPUTS = {"inputs": STEP}
RULES = PLAIN | MASKED | COMPACT | REFRESHED | {"given": {}} | BUDGETED | INPUTS


def wrapped(name: str, base: torch.optim.Optimizer, net: nn.Module | None) -> MDGDOptimizer:
    settings = dict(RULES[name])
    if name == "given":
        parameters = [p for group in base.param_groups for p in group["params"]]
        settings["mask"] = Given([whole(p) > 0 for p in parameters])
    if name in INPUTS:
        assert net is not None
        settings["protect"] = VisualInputs(net, 0.7, refresh=2, text_module=net.trunk)
    return MDGDOptimizer(base, **settings)


def observed(optimizer: MDGDOptimizer) -> VisualInputs:
    """What looks at the inputs of layers."""
    assert optimizer.inputs is not None
    return optimizer.inputs

"""The rules that the golden runs go through, and how each is built."""

from typing import Any

import torch

from tests.distributed.setups import whole
from torch_mdgd.masks import Given, Magnitude, Random, TopK
from torch_mdgd.optimizer import MDGDOptimizer
from torch_mdgd.rules import MDGD, DriftBudget, Project, ProtectInputs, StepProject

PLAIN: dict[str, dict[str, Any]] = {
    "published": {},
    "weighted": {"rule": lambda: MDGD(align=0.3, regularize=2.0)},
    "align": {"rule": lambda: MDGD(align=3.0, regularize=0.0)},
    "no align": {"rule": lambda: MDGD(align=0.0)},
    "project": {"rule": lambda: Project(align=0.5)},
    "step": {"rule": lambda: StepProject()},
    "step, restored": {"rule": lambda: StepProject(restore=0.1)},
}
MASKED: dict[str, dict[str, Any]] = {
    "top": {"mask": TopK(0.3)},
    "random": {"mask": Random(0.3, seed=1), "rule": lambda: MDGD(regularize=0.0)},
    "magnitude": {"mask": Magnitude(0.3)},
    "masked project": {"mask": TopK(0.3), "rule": lambda: Project()},
    "masked step": {"mask": TopK(0.3), "rule": lambda: StepProject(restore=0.1)},
}
COMPACT = {f"{name}, compact": {**form, "compact": True} for name, form in MASKED.items()}
REFRESHED = {"top, refreshed": {"mask": TopK(0.3, refresh=2)}}
BUDGETED: dict[str, dict[str, Any]] = {
    "budget": {"rule": lambda: DriftBudget(MDGD(), 0.1)},
    "budget, project": {"rule": lambda: DriftBudget(Project(), 0.1)},
    "budget, top, compact": {"rule": lambda: DriftBudget(MDGD(), 0.1), "mask": TopK(0.3), "compact": True},
}
INPUTS: dict[str, dict[str, Any]] = {"inputs": {}}
RULES = PLAIN | MASKED | COMPACT | REFRESHED | {"given": {}} | BUDGETED | INPUTS
# One of each kind; that two processes agree with one is asked of the others in tests/distributed.
IN_TWO = ("published", "step, restored", "top, compact", "top, refreshed", "given", "budget, top, compact", "inputs")


def wrapped(name: str, base: torch.optim.Optimizer, net: Any) -> MDGDOptimizer:
    settings = dict(RULES[name])
    if name == "given":
        parameters = [p for group in base.param_groups for p in group["params"]]
        settings["mask"] = Given([whole(p) > 0 for p in parameters])
    if name in INPUTS:
        settings["rule"] = lambda: ProtectInputs(net, 0.7, refresh=2, text_module=net.trunk)
    rule = settings.pop("rule", lambda: None)()
    return MDGDOptimizer(base, rule, **settings)


def tell_drift(optimizer: MDGDOptimizer, distance: float, size: float) -> None:
    """A step's features have moved so far, beside their size."""
    rule: Any = optimizer.rule
    rule._sums = torch.tensor([distance, size], dtype=torch.float64)


def observed(optimizer: MDGDOptimizer) -> Any:
    """What looks at the inputs of layers."""
    return optimizer.rule

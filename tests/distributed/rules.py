"""Rules that look at features or inputs, in every process of a test: a drift budget and protected inputs.

With one process the part is the whole batch, as in :mod:`tests.distributed.setups`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import checkpoints, setups
from torch_mdgd import MDGD, DriftBudget, MDGDOptimizer, ProtectInputs, Rule, mdgd_backward

FORMS: dict[str, Callable[[nn.Module], Rule]] = {
    "budget": lambda model: DriftBudget(MDGD(), 0.02),
    "inputs": lambda model: ProtectInputs(model, 0.7, refresh=2),
}
PICTURES = {"ddp": setups.SOME_WITHOUT, "fsdp": setups.ALL_WITH}
CASES = [(kind, form) for kind in PICTURES for form in FORMS]


def build(kind: str, form: str) -> tuple[nn.Module, MDGDOptimizer]:
    net = setups.tiny_llava()
    model = net
    if kind == "ddp":
        model = DistributedDataParallel(net)
    elif kind == "fsdp":
        for module in (*net.model.language_model.layers, net.model.multi_modal_projector):
            fully_shard(module)
        fully_shard(net)
    base = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return model, MDGDOptimizer(base, FORMS[form](net))


def train(
    model: nn.Module, optimizer: MDGDOptimizer, pictures: Any, rank: int, world: int, steps: Sequence[int]
) -> dict[str, Any]:
    """Two micro-batches a step; returns whole weights, what the rule holds, and diagnostics."""
    for step in steps:
        for i in range(2):
            batch = setups.llava_part(10 * step + i, rank, world, pictures[step])
            mdgd_backward(model, optimizer, batch, alignment="mse", weight=0.5, combine=i == 1)
        optimizer.step()
        optimizer.zero_grad()
    rule: Any = optimizer.rule
    held = [*rule.covariances.values(), *rule.bases.values()] if isinstance(rule, ProtectInputs) else [rule.pull]
    weights = [setups.whole(p) for p in model.parameters()]
    return {"weights": weights, "held": held, "diagnostics": optimizer.diagnostics}


def half_way_and_on(kind: str, form: str, pictures: Any, folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Four steps, saved after two."""
    parts = build(kind, form)
    train(*parts, pictures, rank, world, range(2))
    dcp.save(checkpoints.state(*parts), checkpoint_id=folder)
    return train(*parts, pictures, rank, world, range(2, 4))


def resumed(kind: str, form: str, pictures: Any, folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    parts = build(kind, form)
    checkpoints.restore(*parts, folder)
    return train(*parts, pictures, rank, world, range(2, 4))


def alone(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What one process finds; two go on with what it saved."""
    return {
        (kind, form): half_way_and_on("alone", form, PICTURES[kind], folder / f"one {kind} {form}")
        for kind, form in CASES
    }


def run(case: Callable[..., None], folder: Path, rank: int, world: int) -> None:
    for kind, form in CASES:
        more = PICTURES[kind], rank, world
        case(f"whole, {kind}, {form}", half_way_and_on, kind, form, more[0], folder / f"two {kind} {form}", *more[1:])
        case(f"resumed, {kind}, {form}", resumed, kind, form, more[0], folder / f"one {kind} {form}", *more[1:])

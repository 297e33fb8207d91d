"""A network of two layers with a task loss on its output and a visual loss on its first layer."""

from typing import Literal

import torch
from torch import Tensor, nn

from torch_mdgd import MDGDOptimizer


def network(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)).to(dtype)


def inputs(model: nn.Sequential, number: int = 0) -> Tensor:
    """The data of a step: of six tokens the first four are a picture's."""
    x = torch.linspace(-1, 1, 24) if number == 0 else torch.sin(number * torch.arange(24.0))
    return x.view(6, 4).to(model[0].weight)


def losses(model: nn.Sequential, number: int = 0) -> tuple[Tensor, Tensor]:
    """A visual and a task loss on the data of a step."""
    x = inputs(model, number)
    return (model[0](x) - 0.1).square().mean(), (model(x) - 1).square().mean()


def capture_both(
    model: nn.Sequential, optimizer: MDGDOptimizer, scaler: torch.amp.GradScaler | None = None, scale: float = 1.0
) -> None:
    visual, task = losses(model)
    for kind, loss in (("visual", visual), ("task", task)):
        with optimizer.capture(kind, scale=scale if scaler is None else scaler.get_scale()):
            (loss if scaler is None else scaler.scale(loss)).backward(retain_graph=True)


def capture_needed(model: nn.Sequential, optimizer: MDGDOptimizer, scaler: torch.amp.GradScaler | None = None) -> None:
    """Every gradient that the next combine needs."""
    if "reference_task" in optimizer.needs():
        with optimizer.reference():
            capture_both(model, optimizer, scaler)
    capture_both(model, optimizer, scaler)


def train_step(model: nn.Sequential, optimizer: MDGDOptimizer, number: int) -> None:
    """One step on data of its own, with all that any rule asks for."""
    kinds, rule = optimizer.needs(), optimizer.rule
    with optimizer.reference():
        z_ref = model[0](inputs(model, number)).detach()
        for kind in ("visual", "task") if "reference_task" in kinds else ():
            _capture(model, optimizer, number, kind)
    with rule.observe(torch.arange(6) < 4):
        _capture(model, optimizer, number, "task")
    if "visual" in kinds:
        _capture(model, optimizer, number, "visual")
        rule.saw_features(model[0](inputs(model, number)).detach(), z_ref)
    optimizer.step()
    optimizer.zero_grad()


def _capture(model: nn.Sequential, optimizer: MDGDOptimizer, number: int, kind: Literal["task", "visual"]) -> None:
    visual, task = losses(model, number)
    with optimizer.capture(kind):
        (task if kind == "task" else visual).backward()

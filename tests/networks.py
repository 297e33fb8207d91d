"""A network of two layers with a task loss on its output and a visual loss on its first layer."""

import torch
from torch import Tensor, nn

from torch_mdgd import MDGDOptimizer


def network(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)).to(dtype)


def losses(model: nn.Sequential) -> tuple[Tensor, Tensor]:
    """A visual and a task loss on fixed data."""
    x = torch.linspace(-1, 1, 24, dtype=model[0].weight.dtype).view(6, 4)
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

"""Every rule and every storage, on a model whose layers all see the same inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd import MDGD, Anchor, DriftBudget, MDGDOptimizer, Project, ProtectInputs, Rule, StepProject, rules
from torch_mdgd.masks import Random
from torch_mdgd.rules.base import KINDS

# Wide enough for products of low precision, where a CPU has them.
WIDTH = 32
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
RULES: dict[str, Callable[[nn.Module], Rule]] = {
    "MDGD": lambda model: MDGD(0.7, 1.3),
    "MDGD, every": lambda model: MDGD(0.7, 0, every=2),
    "Project": lambda model: Project(0.7),
    "StepProject": lambda model: StepProject(0.1),
    "ProtectInputs": lambda model: ProtectInputs(model, 0.5, refresh=2, text_module=model),
    "DriftBudget": lambda model: DriftBudget(MDGD(0.7, 0), 0.1),
    "Anchor": lambda model: Anchor(
        model, 0.3, rank=None, tokens="image", warmup=2, relative=False, text_module=model, rule=MDGD(0.7)
    ),
    "Anchor of low rank": lambda model: Anchor(
        model, 0.3, rank=2, tokens="image", warmup=2, relative=False, text_module=model
    ),
}
STORAGES: dict[str, dict[str, Any]] = {
    "unmasked": {},
    "dense": {"mask": Random(0.4)},
    "compact": {"mask": Random(0.4), "compact": True},
    "offload": {"offload": True},
}
# Protected inputs mix the elements of a row, and take no mask. What the reference lies on matters to these two alone.
PAIRS = [
    (rule, storage)
    for rule in RULES
    for storage in STORAGES
    if (rule != "ProtectInputs" or storage == "unmasked") and (storage != "offload" or rule in ("MDGD", "Anchor"))
]


def test_every_rule_is_here():
    assert {name.split()[0].strip(",") for name in RULES} == set(rules.__all__) - {"Rule"}


class Branches(nn.Module):
    """Two linear layers on the same inputs."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(WIDTH, n, device=device, dtype=torch.float32) for n in (20, 16))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(normal(p.shape, i))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def normal(shape: Sequence[int], seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)


def train(model: Branches, optimizer: MDGDOptimizer, steps: range) -> None:
    """Steps with gradients from nowhere, and inputs and features to look at."""
    device = model.a.weight.device
    size = torch.arange(1, 1 + WIDTH, dtype=torch.float32, device=device)
    images = torch.arange(8, dtype=torch.int64, device=device).view(2, 4) % 2 == 0
    for step in steps:
        with optimizer.rule.observe(images):
            model(normal((2, 4, WIDTH), 100 + step, device) * size)
        optimizer.set_gradients(
            **{
                kind: [normal(p.shape, 1000 * step + 10 * i + k, device) for k, p in enumerate(model.parameters())]
                for i, kind in enumerate(KINDS)
                if kind in optimizer.needs()
            }
        )
        z = normal((4, 6), 200 + step, device)
        optimizer.rule.saw_features(z, z + 0.1 * normal((4, 6), 300 + step, device))
        optimizer.step()
        optimizer.zero_grad()

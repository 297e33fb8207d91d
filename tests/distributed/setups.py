"""What every process of a test does: a small network or LLaVA, trained for some steps on its part of each batch.

With one process the part is the whole batch, which is what two processes have to agree with.
"""

import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.tiny_models import llava, llava_batch
from torch_mdgd import Magnitude, MDGDOptimizer, TopK, mdgd_backward
from torch_mdgd.rules import MDGD, Project, StepProject

EXAMPLES = Path(__file__).parents[2] / "examples"

FORMS: dict[str, dict[str, Any]] = {
    "published": {},
    "align": {"rule": lambda: MDGD(align=0.5, regularize=0)},
    "project": {"rule": lambda: Project()},
    "step": {"rule": lambda: StepProject(restore=0.1)},
    "masked": {"mask": TopK(0.3, refresh=2)},
    "masked once": {"mask": TopK(0.3)},
    "masked step": {"rule": lambda: StepProject(), "mask": TopK(0.3)},
    "masked when wrapped": {"rule": lambda: Project(), "mask": Magnitude(0.3)},
}
UNMASKED = ("published", "align", "project", "step", "masked")
COMPACT = {f"{name}, compact": {**form, "compact": True} for name, form in FORMS.items() if name not in UNMASKED}
FORMS |= COMPACT
STEPS = 4


class Network(nn.Module):
    """Features z of an uneven size, on which a visual loss looks; a head for the task; a part that few rows use."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.head = nn.Linear(3, 1)
        self.rare = nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.trunk(x)
        out = self.head(z)
        rows = (x[:, :1] > 0).any(1).nonzero().squeeze(1)
        if rows.numel():
            out = out.index_add(0, rows, self.rare(z[rows]))
        return z, out


def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


def part(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Eight rows, of which only those of the second half use the rare part."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() * torch.tensor([-1.0] * 4 + [1.0] * 4)
    y = torch.randn(8, 1, generator=generator, dtype=torch.float64)
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    return x[rows], y[rows]


def parallel(net: nn.Module, kind: str) -> nn.Module:
    """The network of this process alone, in DDP, or sharded in two groups."""
    if kind == "ddp":
        return DistributedDataParallel(net, find_unused_parameters=True)
    if kind == "fsdp":
        for module in (net.trunk[0], net):
            # A rank without the rare part's rows has no gradient for it, and would send fewer than the other.
            fully_shard(module).set_reduce_scatter_unused_params(True)
    return net


def whole(x: Tensor | None) -> Tensor | None:
    return x if x is None else getattr(x, "full_tensor", x.clone)().detach()


def snapshots(net: nn.Module, optimizer: MDGDOptimizer, d: Sequence[Tensor | None]) -> dict[str, Any]:
    """Everything that has to agree, as whole tensors."""
    return {
        "d": [whole(x) for x in d],
        "weights": [whole(p) for p in net.parameters()],
        "mask": [whole(x) for x in getattr(optimizer._storage, "masks", None) or ()],
        "diagnostics": optimizer.diagnostics,
    }


def adamw(net: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)


def train(
    model: nn.Module, optimizer: MDGDOptimizer, rank: int, world: int, steps: Sequence[int] = range(STEPS)
) -> Iterator[dict[str, Any]]:
    """The passes by hand, one forward for each backward."""
    for step in steps:
        x, y = part(step, rank, world)

        def task(x: Tensor = x, y: Tensor = y) -> None:
            with optimizer.capture("task"):
                (model(x)[1] - y).square().mean().backward()

        def visual(other: Tensor, x: Tensor = x) -> None:
            with optimizer.capture("visual"):
                (model(x)[0] - other).square().mean().backward()

        with torch.no_grad():
            z = model(x)[0]
        with optimizer.reference(model):
            if len(optimizer.needs()) == 4:
                visual(z)
                task()
            with torch.no_grad():
                z_reference = model(x)[0]
        visual(z_reference)
        task()
        optimizer.combine()
        d = [p.grad for p in optimizer.parameters]
        found = snapshots(model, optimizer, d)
        optimizer.step()
        optimizer.zero_grad()
        yield {**found, "weights": [whole(p) for p in model.parameters()]}


def wrapped(base: torch.optim.Optimizer, form: dict[str, Any]) -> MDGDOptimizer:
    """With a rule of its own each time."""
    make = form.get("rule", lambda: None)
    return MDGDOptimizer(base, make(), mask=form.get("mask"), compact=form.get("compact", False))


def by_hand(kind: str, form: str, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    net = network()
    model = parallel(net, kind)
    return list(train(model, wrapped(adamw(net), FORMS[form]), rank, world))


def twice_after_one_forward(rank: int, world: int, average: bool) -> list[Tensor | None]:
    """The trap of DDP: of two backward passes after one forward pass it reduces the first."""
    net = network()
    model = parallel(net, "ddp") if world > 1 else net
    optimizer = MDGDOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), Project())
    if average and world > 1:
        optimizer.average_over(model.process_group)
    x, y = part(0, rank, world)
    with model.no_sync() if average and world > 1 else nullcontext():
        z, out = model(x)
        with optimizer.capture("visual"):
            z.square().mean().backward(retain_graph=True)
        with optimizer.capture("task"):
            (out - y).square().mean().backward()
    optimizer.combine()
    return [p.grad for p in net.parameters()]


# mdgd_backward on LLaVA.


def tiny_llava() -> nn.Module:
    model = llava().double()
    model.model.vision_tower.requires_grad_(False)
    return model


def llava_part(step: int, rank: int, world: int, pictures: Sequence[bool]) -> dict[str, Tensor]:
    """Rows with a picture, and rows of text alone in their place."""
    batch = llava_batch(seed=step, images=len(pictures))
    batch["pixel_values"] = batch["pixel_values"].double()
    kept = torch.tensor(pictures)
    text = torch.randint(3, 30, batch["input_ids"].shape, generator=torch.Generator().manual_seed(step))
    batch["input_ids"] = torch.where(kept[:, None], batch["input_ids"], text)
    n = len(pictures) // world
    rows = slice(rank * n, (rank + 1) * n)
    out = {name: x[rows] for name, x in batch.items()}
    out["pixel_values"] = out["pixel_values"][kept[rows]]
    if not kept[rows].any():
        del out["pixel_values"]
    return out


LLAVA_FORMS: dict[str, dict[str, Any]] = {
    "published": {},
    "masked, accumulated": {"mask": TopK(0.2), "micro_batches": 2},
    "step": {"rule": lambda: StepProject()},
}
# By step: which of the four rows have a picture. Two ranks have two rows each.
SOME_WITHOUT = [(True, True, True, False), (True, True, False, False), (False,) * 4, (False, True, True, True)]
ALL_WITH = [(True, True, True, False), (True, False, True, True), (False,) * 4, (True,) * 4]


def with_backward(
    kind: str, form: str, pictures: Sequence[Sequence[bool]], rank: int = 0, world: int = 1
) -> list[dict[str, Any]]:
    net = tiny_llava()
    model = net
    if kind == "ddp":
        model = DistributedDataParallel(net)
    elif kind == "fsdp":
        for module in (*net.model.language_model.layers, net.model.multi_modal_projector):
            fully_shard(module)
        # Freed after the forward pass, the outermost parameters are missed by a backward pass that begins inside.
        fully_shard(net, reshard_after_forward=form == "step" or None)
    settings = LLAVA_FORMS[form]
    # Not Adam, which enlarges the rounding of L_v, taken in float32, where a gradient is small.
    base = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    optimizer = wrapped(base, settings)
    if kind == "told":
        optimizer.average_over(torch.distributed.group.WORLD)
    k, found = settings.get("micro_batches", 1), []
    for step, rows in enumerate(pictures):
        for i in range(k):
            batch = llava_part(10 * step + i, rank, world, rows)
            mdgd_backward(model, optimizer, batch, alignment="mse", weight=1 / k, combine=i == k - 1)
        now = snapshots(net, optimizer, [p.grad for p in optimizer.parameters])
        optimizer.step()
        optimizer.zero_grad()
        found.append({**now, "weights": [whole(p) for p in net.parameters()]})
    return found


# What a process tells of a function, and of a program.


def error(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, FileNotFoundError) as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing was raised"


def example(name: str, folder: Path) -> str:
    printed = StringIO()
    sys.path.insert(0, str(EXAMPLES))
    before = os.getcwd()
    os.chdir(folder)
    with redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    os.chdir(before)
    return printed.getvalue()

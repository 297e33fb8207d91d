"""Short runs of every rule: one process and two, dense and compact, with all that they leave behind.

What is recorded is d, the parameters after each step, and the state dict at the end.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from tests.distributed import setups
from tests.golden.rules import BUDGETED, IN_TWO, INPUTS, RULES, observed, tell_drift, wrapped

STEPS = 4
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}
SHAPES = (((7, 5), torch.float32), ((5,), torch.float32), ((4, 3, 2), torch.bfloat16), ((6, 6), torch.float64))


def given(name: str, base: str) -> dict[str, Tensor]:
    """Gradients of any kind, in parameters of several dtypes."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    parameters = [nn.Parameter(normal(*spec)) for spec in SHAPES]
    optimizer = wrapped(name, BASES[base](parameters), None)
    out = {}
    for step in range(STEPS):
        gradients = {
            kind: [normal(*spec) for spec in SHAPES]
            for kind in ("task", "visual", "reference_task", "reference_visual")
        }
        if step == 2:
            gradients["visual"][1] = gradients["reference_task"][2] = None
        optimizer.set_gradients(**{kind: gradients[kind] for kind in optimizer.needs()})
        optimizer.combine()
        out |= {f"d {step} {i}": p.grad for i, p in enumerate(parameters)}
        optimizer.step()
        optimizer.zero_grad()
        out |= {f"weights {step} {i}": p.detach().clone() for i, p in enumerate(parameters)}
    return {name: x.clone() for name, x in (out | state(optimizer)).items()}


def trained(name: str, kind: str, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """A network that is trained on its own gradients."""
    net = setups.network()
    model = setups.parallel(net, kind)
    optimizer = wrapped(name, setups.adamw(net), net)
    if kind == "ddp" and name in INPUTS:
        # Nothing else tells: the gradients of the task are averaged by DDP.
        observed(optimizer).sum_over([model.process_group])
    out: dict[str, Tensor] = {}
    for step in range(STEPS):
        if name in INPUTS:
            x, y = setups.part(step, rank, world)
            with observed(optimizer).observe(x[:, 0] > 0):
                loss = (model(x)[1] - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found: dict[str, Any] = {"d": [], "weights": [setups.whole(p) for p in net.parameters()]}
        else:
            if name in BUDGETED:
                tell_drift(optimizer, 0.3 * step, 4.0)
            (found,) = setups.train(model, optimizer, rank, world, [step])
        for key in ("d", "weights"):
            out |= {f"{key} {step} {i}": x for i, x in enumerate(found[key]) if x is not None}
    return {key: x.clone() for key, x in (out | state(optimizer)).items()}


def state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything in the state dict: tensors as whole ones, numbers as tensors."""
    saved, out = optimizer.state_dict(), {}
    for i, entry in saved["state"].items():
        for key, value in entry.items():
            out[f"state {i} {key}"] = setups.whole(torch.as_tensor(value))
    for i, group in enumerate(saved["param_groups"]):
        for key, value in group.items():
            if key.startswith("mdgd_") and isinstance(value, float | Tensor):
                out[f"group {i} {key}"] = torch.as_tensor(value)
    return out


def alone() -> dict[str, Tensor]:
    out = {}
    for name in RULES:
        for base in BASES if name not in (*INPUTS, *BUDGETED) else ():
            out |= {f"{name} / given, {base} / {key}": x for key, x in given(name, base).items()}
        out |= {f"{name} / alone / {key}": x for key, x in trained(name, "alone").items()}
    return out


def in_two(rank: int) -> dict[str, Tensor]:
    """In a group of two processes."""
    out = {}
    for name in IN_TWO:
        for kind in ("ddp", "fsdp"):
            out |= {f"{name} / {kind} / {key}": x for key, x in trained(name, kind, rank, 2).items()}
    return out


def _start(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(in_two(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def everything(folder: Path) -> dict[str, Tensor]:
    """All runs, by a name: those of two processes as their first rank saw them."""
    torch.set_num_threads(1)
    torch.multiprocessing.spawn(_start, (folder,), nprocs=2)
    found = alone() | torch.load(folder / "0.pt", weights_only=True)
    return {name: x.detach().contiguous().clone() for name, x in sorted(found.items())}

"""A model's parameters and buffers by the names that they have without ``torch.compile`` and data parallelism."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from torch_mdgd.delta.file import digest

# Of torch.compile and of activation checkpointing, at any depth.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
LARGE = 65_536
"""A persistent buffer of more elements is of the base model; one of fewer travels in the delta."""


def plain_name(model: nn.Module, name: str) -> str:
    """The name that a parameter or buffer has in the model that was wrapped."""
    out: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        parallel = part == "module" and isinstance(module, DataParallel | DistributedDataParallel)
        if part not in WRAPPERS and not parallel:
            out.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(out)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name; one that is tied stands under the first of its names."""
    return {plain_name(model, name): p for name, p in model.named_parameters()}


def buffers_of(model: nn.Module, large: bool) -> dict[str, Tensor]:
    """Persistent buffers of more than ``LARGE`` elements, or those of fewer, by name."""
    return {name: x for name, x in _persistent(model) if (x.numel() > LARGE) is large}


def _persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for name, x in module._buffers.items():
            if x is not None and name not in module._non_persistent_buffers_set:
                yield plain_name(model, f"{path}.{name}" if path else name), x


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bits of a model's parameters and large persistent buffers.

    Buffers up to 65,536 elements do not count: such as BatchNorm's statistics change while a model is used.

    Args:
        model: also inside ``torch.compile`` or DistributedDataParallel. If it is sharded, all ranks call this.
    """
    return digest([*parameters_of(model).items(), *buffers_of(model, large=True).items()])

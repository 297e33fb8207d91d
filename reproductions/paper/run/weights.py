"""What a run changed of the published weights, as a file: only the parameters that differ."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reproductions.shared.files import FileError, named

NAME, CHECKPOINTS = "trained.safetensors", "checkpoints"


@torch.no_grad()
def changes(network: nn.Module, pretrained: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The parameters that differ from the published ones, in their dtype on the CPU, and how many numbers differ."""
    changed, count = {}, 0
    for name, p in network.named_parameters():
        now, before = p.detach().cpu(), pretrained[name]
        if not torch.equal(now, before.to(now.dtype)):
            changed[name] = now.contiguous()
            count += int((now != before.to(now.dtype)).sum())
    return changed, count


def save_changes(changed: dict[str, Tensor], path: Path) -> None:
    """Write them; the file appears whole or not at all."""
    part = path.with_suffix(".part")
    save_file(changed, part, {"format": "pt"})
    os.replace(part, path)


@torch.no_grad()
def load_changes(network: nn.Module, path: Path) -> None:
    """Put them in a network with the published weights.

    Raises:
        FileError: the file is broken, or of another network.
    """
    parameters = dict(network.named_parameters())
    with named(path, "a whole safetensors file"):
        values = load_file(path)
    for name, value in values.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise FileError(f"{path}: {name} is no parameter of this network, or of another shape")
        parameters[name].copy_(value)

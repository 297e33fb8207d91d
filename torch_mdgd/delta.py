"""A fine-tune as a file: the numbers that changed and where they stand.

Safetensors: for each changed parameter ``<name>.values`` in its dtype and ``<name>.positions``, ascending int32 indices
into it flattened. The metadata hold a fingerprint of the model that it belongs on and a checksum of the contents.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd.optimizer import MDGDOptimizer
from torch_mdgd.parallel import dtensor

FORMAT = "torch_mdgd delta 1"
VALUES, POSITIONS = ".values", ".positions"


@dataclass
class AppliedDelta:
    """What a delta replaced, so that it can be undone.

    Args:
        model: holds the fine-tune's elements.
        replaced: by the parameter's name, positions and the base model's values there.
    """

    model: nn.Module
    replaced: dict[str, tuple[Tensor, Tensor]]

    @torch.no_grad()
    def undo(self) -> None:
        """Put the base model's numbers back, bit for bit."""
        parameters = dict(self.model.named_parameters())
        for name, (positions, values) in self.replaced.items():
            _put(parameters[name], positions, values)
        self.replaced = {}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bits of a model's parameters and persistent buffers.

    Args:
        model: if it is sharded, all ranks call this.
    """
    return _digest(model.state_dict().items())


@torch.no_grad()
def save_delta(model: nn.Module, path: str | os.PathLike[str], optimizer: MDGDOptimizer) -> int:
    """Write the numbers in which the model differs from the optimizer's reference φ.

    If ``fully_shard`` has sharded the parameters, all ranks call it and the first of them writes. Each gathers one
    parameter at a time, for the fingerprint, and the changed numbers.

    Args:
        model: the fine-tuned model.
        path: the file, replaced only once it is written whole.
        optimizer: holds φ and the model's trainable parameters.

    Returns:
        how many numbers changed.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: a parameter of the optimizer is not the model's.
    """
    save_file = _safetensors().torch.save_file
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = optimizer.parameters
    for i, p in enumerate(parameters):
        if id(p) not in names:
            raise ValueError(f"save_delta: parameter {i} of the optimizer is not one of this model's")
    tuned = [p.detach().cpu().reshape(-1) for p in dtensor.local(parameters)]
    tuned = [
        x.clone() if x.data_ptr() == p.data_ptr() else x for x, p in zip(tuned, dtensor.local(parameters), strict=True)
    ]
    tensors: dict[str, Tensor] = {}
    with optimizer.reference(model):
        base = fingerprint(model)
        for p, part, new in zip(parameters, dtensor.local(parameters), tuned, strict=True):
            changed = (_bits(part.detach().cpu().reshape(-1)) != _bits(new)).nonzero().squeeze(1)
            changed, values = dtensor.in_whole(changed.to(p.device), [new[changed].to(p.device)], p)
            if changed.numel():
                tensors[names[id(p)] + VALUES] = values[0].cpu()
                tensors[names[id(p)] + POSITIONS] = changed.cpu()
    metadata = {"format": FORMAT, "base": base, "checksum": _digest(tensors.items())}
    divided = any(map(dtensor.is_sharded, parameters))
    if not divided or torch.distributed.get_rank() == 0:
        part = Path(f"{os.fspath(path)}.part")
        save_file(tensors, part, metadata)
        part.replace(path)
    if divided:
        torch.distributed.barrier()
    return sum(x.numel() for name, x in tensors.items() if name.endswith(VALUES))


@torch.no_grad()
def apply_delta(model: nn.Module, path: str | os.PathLike[str]) -> AppliedDelta:
    """Put a fine-tune's numbers on its base model, bit for bit.

    Everything is checked before the first number is written.

    Args:
        model: the base model, whole on this process.
        path: what :func:`save_delta` wrote.

    Returns:
        what was replaced; its ``undo()`` puts it back.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is no delta, is cut short or was changed, or belongs on another model; naming it. Or the
            model is sharded.
    """
    library = _safetensors()
    dtensor.refuse_sharded("apply_delta", list(model.parameters()), "apply it before fully_shard")
    try:
        with library.safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a delta of torch_mdgd (format {metadata.get('format')!r})")
    if metadata.get("checksum") != _digest(tensors.items()):
        raise ValueError(f"{path}: the contents do not match their checksum; the file was changed or damaged")
    found = fingerprint(model)
    if metadata["base"] != found:
        raise ValueError(
            f"{path}: made for a base model with fingerprint {metadata['base'][:12]}…, this one has {found[:12]}…: "
            "load the weights that fine-tuning began with, in the same dtype"
        )
    parameters = dict(model.named_parameters())
    replaced = {}
    for name in (key.removesuffix(VALUES) for key in tensors if key.endswith(VALUES)):
        positions = tensors[name + POSITIONS].long().to(parameters[name].device)
        replaced[name] = positions, parameters[name].reshape(-1)[positions].clone()
        _put(parameters[name], positions, tensors[name + VALUES])
    return AppliedDelta(model, replaced)


def _put(parameter: Tensor, positions: Tensor, values: Tensor) -> None:
    flat = parameter.reshape(-1)
    flat[positions] = values.to(flat)
    if flat.data_ptr() != parameter.data_ptr():
        parameter.copy_(flat.view(parameter.shape))


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers: NaN equals NaN there, and 0 differs from −0."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, held in sorted(tensors, key=lambda item: item[0]):
        x = dtensor.whole(held)
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safetensors() -> Any:
    """The module ``safetensors``, with its ``torch`` part: needed for deltas alone, so not by the package."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("a delta is a safetensors file: pip install safetensors numpy") from error
    return safetensors

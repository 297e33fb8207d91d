"""The file of a delta, format 2: what it holds, how it is written, and all that can be checked without a model."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_mdgd.parallel import dtensor

FORMAT = "torch_mdgd delta 2"
VALUES, POSITIONS, BUFFER = ".values", ".positions", ".buffer"


@dataclass(frozen=True)
class Shape:
    """What a parameter of the base model is.

    Attributes:
        dtype: without ``torch.``, such as "bfloat16".
        shape: its sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> "Shape":
        """That of a tensor; of a sharded one, of the whole."""
        return cls(str(x.dtype).removeprefix("torch."), tuple(x.shape))

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return torch.Size(self.shape).numel()

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


@dataclass(frozen=True)
class Delta:
    """What a file holds.

    Attributes:
        base: the fingerprint of the base model.
        parameters: of the base model, by name.
        changes: of each changed parameter, positions and values, 1-D.
        buffers: small persistent buffers of the fine-tuned model, whole.
    """

    base: str
    parameters: dict[str, Shape]
    changes: dict[str, tuple[Tensor, Tensor]]
    buffers: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the keys of the file."""
        out = {name + VALUES: values for name, (_, values) in self.changes.items()}
        out |= {name + POSITIONS: positions for name, (positions, _) in self.changes.items()}
        return out | {name + BUFFER: x for name, x in self.buffers.items()}

    @property
    def elements(self) -> int:
        """How many elements of parameters changed."""
        return sum(values.numel() for _, values in self.changes.values())

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a file, which takes the place of another only once it is whole."""
        listed = json.dumps({name: [x.dtype, list(x.shape)] for name, x in self.parameters.items()})
        tensors = self.tensors
        checksum = digest(tensors.items(), f"{FORMAT}\n{self.base}\n{listed}\n")
        metadata = {"format": FORMAT, "base": self.base, "parameters": listed, "checksum": checksum}
        part = Path(f"{os.fspath(path)}.part")
        safetensors().torch.save_file(tensors, part, metadata)
        part.replace(path)


def read(path: str | os.PathLike[str]) -> Delta:
    """A file's contents, checked.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is no delta, is cut short, was changed, or holds positions that are none; naming it.
    """
    library = safetensors()
    try:
        with library.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a delta of this version of torch_mdgd (format {metadata.get('format')!r})")
    base, listed = metadata.get("base", ""), metadata.get("parameters", "")
    if metadata.get("checksum") != digest(tensors.items(), f"{FORMAT}\n{base}\n{listed}\n"):
        raise ValueError(f"{path}: the contents do not match their checksum; the file was changed or damaged")
    try:
        parameters = {name: Shape(dtype, tuple(shape)) for name, (dtype, shape) in json.loads(listed).items()}
        return _sorted(base, parameters, tensors)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a well-formed delta: {error}") from error


def _sorted(base: str, parameters: dict[str, Shape], tensors: Mapping[str, Tensor]) -> Delta:
    """A ValueError if tensors do not pair up, or do not fit the parameters."""
    changes, buffers = {}, {}
    for key, x in tensors.items():
        if key.endswith(VALUES):
            name = key.removesuffix(VALUES)
            changes[name] = _pair(name, tensors.get(name + POSITIONS), x, parameters.get(name))
        elif key.endswith(BUFFER):
            buffers[key.removesuffix(BUFFER)] = x
        elif not key.endswith(POSITIONS) or key.removesuffix(POSITIONS) + VALUES not in tensors:
            raise ValueError(f"{key!r} is neither values with positions nor a buffer")
    return Delta(base, parameters, changes, buffers)


def _pair(name: str, positions: Tensor | None, values: Tensor, shape: Shape | None) -> tuple[Tensor, Tensor]:
    if shape is None:
        raise ValueError(f"{name!r} is none of the parameters")
    if positions is None or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name!r} has no positions")
    if values.dim() != 1 or positions.shape != values.shape or Shape.of(values).dtype != shape.dtype:
        raise ValueError(
            f"{name!r} is {shape}, and has values of {values.dtype}, {tuple(values.shape)} at positions of shape "
            f"{tuple(positions.shape)}"
        )
    if positions.numel() and (int(positions[0]) < 0 or int(positions[-1]) >= shape.numel):
        raise ValueError(f"positions of {name!r} lie outside its {shape.numel} elements")
    if not bool((positions[1:] > positions[:-1]).all()):
        raise ValueError(f"positions of {name!r} do not ascend")
    return positions, values


def digest(tensors: Iterable[tuple[str, Tensor]], head: str = "") -> str:
    """SHA-256 of names, dtypes, shapes and bits, in the order of names; of sharded tensors, of the whole ones."""
    found = hashlib.sha256(head.encode())
    for name, held in sorted(tensors, key=lambda item: item[0]):
        x = dtensor.whole(held).detach()
        found.update(f"{name} {Shape.of(x).dtype} {list(x.shape)}\n".encode())
        found.update(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def safetensors() -> Any:
    """The module ``safetensors``, with its ``torch`` part: needed for deltas alone, so not by the package."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("a delta is a safetensors file: pip install safetensors numpy") from error
    return safetensors

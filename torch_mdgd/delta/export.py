"""A delta on its base as a folder of its own, which whatever loads the base loads too."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd.delta.file import Delta, digest, read, safetensors
from torch_mdgd.delta.model import apply_delta
from torch_mdgd.delta.names import buffers_of, parameters_of
from torch_mdgd.models.folders import load_model

COPIED = {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".spm", ".md", ""}
"""Endings of files that go with the weights: configuration, processor, tokenizer, licence."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTED = (".lora_A.", ".lora_B.", ".base_layer.", ".modules_to_save.")


@dataclass(frozen=True)
class Exported:
    """What was written, and what was compared when it was loaded back.

    Args:
        folder: where it is.
        rewritten: files of weights that differ from the base's.
        copied: files of weights that are the base's.
        kind: the class that was loaded.
        parameters: how many were compared.
        buffers: how many were compared.
        elements: how many elements these have.
        rounded: how many of them are off by the rounding of an addition; none but in adapters.
    """

    folder: Path
    rewritten: tuple[str, ...]
    copied: tuple[str, ...]
    kind: str
    parameters: int
    buffers: int
    elements: int
    rounded: int = 0

    def __str__(self) -> str:
        total = len(self.rewritten) + len(self.copied)
        return (
            f"written   {self.folder}\n"
            f"rewritten {len(self.rewritten)} of {total} files of weights: {', '.join(self.rewritten) or 'none'}\n"
            f"checked   loaded back as {self.kind}: {self.parameters} parameters and {self.buffers} buffers, "
            f"{self.elements:,} elements, equal base + delta bit for bit"
            + (f", but {self.rounded:,} elements that are off by rounding" if self.rounded else "")
        )


def export_checkpoint(
    base: str | os.PathLike[str], delta: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> Exported:
    """Write base + delta as a folder of safetensors, and compare what it loads with what it should be.

    Files of weights that the delta does not touch are copied as they are, and so are the base's configuration and
    processor. Where the delta was made in another dtype than the base is stored in, the new configuration names that.
    The folder appears under its name when the comparison has passed. Needs memory for one model.

    Args:
        base: folder of the base model, of safetensors.
        delta: what :func:`~torch_mdgd.delta.save_delta` wrote.
        folder: to be made; empty if it is there.

    Raises:
        FileExistsError: the folder holds something.
        ImportError: transformers or safetensors is not installed.
        OSError: no such base or delta.
        ValueError: the delta does not belong on the base, or is one of an adapter; or what was written does not load as
            base + delta, naming a parameter.
    """
    base, found = Path(base), read(delta)
    dtype = dtype_of(found)
    model = base_model(base, found, dtype)
    apply_delta(model, delta)
    wanted, sizes = digests_of(tensors_of(model)), (len(parameters_of(model)), len(stored_buffers(model)))
    kind, elements = type(model), sum(x.numel() for x in tensors_of(model).values())
    with appearing(Path(folder)) as part:
        rewritten, copied = _write(base, part, reverted(model), None if dtype == "auto" else dtype)
        del model
        require_equal(wanted, digests_of(tensors_of(load_model(part))), f"{folder}: what was written")
    return Exported(Path(folder), rewritten, copied, kind.__name__, *sizes, elements)


def base_model(base: Path, delta: Delta, dtype: Any) -> nn.Module:
    """The base model of a delta, from its folder.

    Raises:
        ValueError: the delta is about a model with adapters in it.
    """
    inside = [name for name in delta.parameters if any(x in f".{name}" for x in ADAPTED)]
    if inside:
        raise ValueError(
            f"this delta is of a model with an adapter in it ({inside[0]!r}): save_pretrained of peft writes that as a "
            "folder which peft and servers load"
        )
    model: nn.Module = load_model(base, dtype)
    return model


def dtype_of(delta: Delta) -> Any:
    """The one floating dtype of a delta's parameters; "auto" if there are several."""
    dtypes = {getattr(torch, x.dtype) for x in delta.parameters.values()}
    floating = {x for x in dtypes if x.is_floating_point}
    return floating.pop() if len(floating) == 1 else "auto"


def reverted(model: Any) -> dict[str, Tensor]:
    """A model's tensors by the names, and in the form, that its checkpoint has."""
    from transformers.core_model_loading import revert_weight_conversion

    out: dict[str, Tensor] = revert_weight_conversion(model, model.state_dict())
    return out


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder beside this one that takes its name when all has gone well, and is removed else."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already: name a folder that is empty, or is not there")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if folder.exists():
            folder.rmdir()
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def digests_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each."""
    return {name: digest([(name, x)]) for name, x in tensors.items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers by name."""
    return {**parameters_of(model), **stored_buffers(model)}


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by name, large ones and small ones."""
    return {**buffers_of(model, large=True), **buffers_of(model, large=False)}


def require_equal(wanted: Mapping[str, str], found: Mapping[str, str], what: str) -> None:
    """A ValueError that names the first difference and counts them."""
    differing = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if differing:
        raise ValueError(
            f"{what} does not load as base + delta: {len(differing)} of {len(wanted)} tensors differ, such as "
            f"{differing[0]!r}; nothing is kept"
        )


def _write(
    base: Path, out: Path, new: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the files of weights that were rewritten, and of those that were copied."""
    rewritten, copied, total = [], [], 0
    for name in _files(base):
        changed, held, metadata = _held(base / name, new)
        total += sum(x.nbytes for x in held.values())
        if changed:
            safetensors().torch.save_file(held, out / name, metadata)
            rewritten.append(name)
        else:
            shutil.copyfile(base / name, out / name)
            copied.append(name)
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix in COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        index.setdefault("metadata", {})["total_size"] = total
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if dtype is not None:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        (out / "config.json").write_text(json.dumps(_named(config, dtype), indent=2) + "\n", encoding="utf-8")
    return tuple(rewritten), tuple(copied)


def _files(base: Path) -> list[str]:
    """Names of a checkpoint's files of weights.

    Raises:
        ValueError: it has neither one file nor an index.
    """
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    if (base / SINGLE).is_file():
        return [SINGLE]
    raise ValueError(f"{base} has neither {SINGLE} nor {INDEX}")


def _held(path: Path, new: Mapping[str, Tensor]) -> tuple[bool, dict[str, Tensor], dict[str, str]]:
    """Whether a file's tensors change; all of them, with the new ones where they differ; and the file's metadata."""
    changed, out = False, {}
    with safetensors().safe_open(path, framework="pt", device="cpu") as file:
        for key in file.keys():  # noqa: SIM118
            x = out[key] = file.get_tensor(key)
            there = new.get(key)
            if there is not None and digest([("", x.to(there.dtype))]) != digest([("", there)]):
                # Tied tensors share memory, which a file of safetensors may not.
                out[key] = there.detach().cpu().contiguous().clone()
                changed = True
        return changed, out, file.metadata() or {"format": "pt"}


def _named(config: Any, dtype: torch.dtype) -> Any:
    """A configuration whose parts name this dtype where they name one; the outermost always does."""
    name = str(dtype).removeprefix("torch.")

    def inside(x: Any) -> Any:
        if not isinstance(x, dict):
            return x
        return {k: name if k in ("dtype", "torch_dtype") and isinstance(v, str) else inside(v) for k, v in x.items()}

    return {**inside(config), "dtype": name}

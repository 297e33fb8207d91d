"""The wrapper's tensors inside an ordinary optimizer state dict.

A state dict is exactly {state, param_groups}: nested layouts and extra top-level keys are lost or refused by
``torch.distributed.checkpoint``. So φ and the mask travel as more entries of each parameter's state, and are taken out
again before the wrapped optimizer sees it: it would cast a bool mask to the parameter's dtype, and take an entry
without its own keys for an initialised state.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_mdgd.rules.base import PREFIX


def pack(state_dict: dict[str, Any], own: Mapping[str, Sequence[Tensor | None]]) -> dict[str, Any]:
    """The wrapped optimizer's state dict with more entries for each parameter; tensors are shared, not copied.

    Args:
        state_dict: of the wrapped optimizer.
        own: by name, one tensor for each parameter, or None for a parameter that has none.
    """
    state = dict(state_dict["state"])
    for i, key in enumerate(_keys(state_dict)):
        more = {PREFIX + name: x for name, tensors in own.items() if (x := tensors[i]) is not None}
        if more:
            state[key] = {**state.get(key, {}), **more}
    return {**state_dict, "state": state}


def unpack(
    state_dict: dict[str, Any], parameters: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[str, list[Tensor | None]]]:
    """The opposite of :func:`pack`; changes nothing.

    Returns:
        the wrapped optimizer's own state dict, and what was packed into it, by name.

    Raises:
        ValueError: it is for another number of parameters, or a name lacks for some parameter that is trained.
    """
    keys = _keys(state_dict)
    if len(keys) != len(parameters):
        raise ValueError(
            f"the loaded state dict is for {len(keys)} parameters, this optimizer has {len(parameters)}: "
            "build it over the same trainable parameters, in the same order, before loading"
        )
    state: dict[Any, Any] = {}
    for key, entry in state_dict["state"].items():
        inner = {k: v for k, v in entry.items() if not _is_own(k)} if isinstance(entry, dict) else entry
        if not isinstance(entry, dict) or inner or not entry:
            state[key] = inner
    found: dict[str, list[Tensor | None]] = {}
    for name in {k for key in keys for k in state_dict["state"].get(key, {}) if _is_own(k)}:
        held = [state_dict["state"].get(key, {}).get(name) for key in keys]
        for i, (x, p) in enumerate(zip(held, parameters, strict=True)):
            if x is None and p.requires_grad:
                raise ValueError(f"the loaded state dict has {name!r} for some parameters but not for parameter {i}")
        found[name.removeprefix(PREFIX)] = [None if x is None else x.detach() for x in held]
    return {**state_dict, "state": state}, found


def load_distributed(state_dict: dict[str, Any], checkpoint_id: str | os.PathLike[str]) -> None:
    """``torch.distributed.checkpoint.load``, also of what a compact run saved.

    That function reads into tensors of the saved sizes, which are unknown to an optimizer that has not chosen its mask:
    here they come from the checkpoint. Every process reads all of the compact state.

    Args:
        state_dict: nested, as ``get_state_dict`` returns it, also inside other dictionaries; filled in place.
        checkpoint_id: a folder.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = FileSystemReader(checkpoint_id).read_metadata()
    paths = metadata.planner_data or {}
    # Without these no mask was chosen, and the state is of the parameters' shapes.
    chosen = {f"{PREFIX}positions", f"{PREFIX}reference"} <= {path[-1] for path in paths.values()}
    saved: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
    for key, path in paths.items():
        entry, found = _at(state_dict, path[:-1]), metadata.state_dict_metadata[key]
        if chosen and isinstance(entry, dict) and f"{PREFIX}positions" in entry:
            value = entry.get(path[-1])
            if isinstance(found, TensorStorageMetadata):
                value = torch.empty(found.size, dtype=found.properties.dtype, device="cpu")
            saved.setdefault(id(entry), (entry, {}))[1][path[-1]] = value
    for entry, values in saved.values():
        # What else a fresh optimizer has there is of a parameter in which nothing was selected.
        entry.clear()
        entry.update(values)
    load(state_dict, checkpoint_id=checkpoint_id)


def _at(tree: Any, path: Sequence[Any]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _keys(state_dict: dict[str, Any]) -> list[Any]:
    return [key for group in state_dict["param_groups"] for key in group["params"]]


def _is_own(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(PREFIX)

"""The wrapper's tensors inside an ordinary optimizer state dict.

A state dict is exactly {state, param_groups}: nested layouts and extra top-level keys are lost or refused by
``torch.distributed.checkpoint``. So φ and the mask travel as more entries of each parameter's state, and are taken out
again before the wrapped optimizer sees it: it would cast a bool mask to the parameter's dtype, and take an entry
without its own keys for an initialised state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

PREFIX = "mdgd_"


def pack(state_dict: dict[str, Any], own: Mapping[str, Sequence[Tensor] | None]) -> dict[str, Any]:
    """The wrapped optimizer's state dict with more entries for each parameter; tensors are shared, not copied.

    Args:
        state_dict: of the wrapped optimizer.
        own: by name, one tensor for each parameter, or None to leave the name out.
    """
    state = dict(state_dict["state"])
    for i, key in enumerate(_keys(state_dict)):
        more = {PREFIX + name: tensors[i] for name, tensors in own.items() if tensors is not None}
        state[key] = {**state.get(key, {}), **more}
    return {**state_dict, "state": state}


def unpack(state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """The opposite of :func:`pack`; changes nothing.

    Returns:
        the wrapped optimizer's own state dict, and what was packed into it, by name.

    Raises:
        ValueError: it is for another number of parameters, or a name is there for some parameters only.
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
        if inner or entry == {}:
            state[key] = inner
    found: dict[str, list[Tensor]] = {}
    for name in {k for key in keys for k in state_dict["state"].get(key, {}) if _is_own(k)}:
        for i, key in enumerate(keys):
            if name not in state_dict["state"].get(key, {}):
                raise ValueError(f"the loaded state dict has {name!r} for some parameters but not for parameter {i}")
        found[name.removeprefix(PREFIX)] = [state_dict["state"][key][name].detach() for key in keys]
    return {**state_dict, "state": state}, found


def require_shapes(name: str, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> None:
    """Raise a ValueError that names the first parameter whose loaded tensor has another shape than it needs."""
    for i, (x, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if tuple(x.shape) != tuple(shape):
            raise ValueError(
                f"the loaded state dict's {PREFIX + name!r} of parameter {i} has shape {tuple(x.shape)}, needed is "
                f"{tuple(shape)}: it was saved from another model or in another parameter order"
            )


def _keys(state_dict: dict[str, Any]) -> list[Any]:
    return [key for group in state_dict["param_groups"] for key in group["params"]]


def _is_own(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(PREFIX)

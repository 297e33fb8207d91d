"""The wrapper's tensors inside an ordinary optimizer state dict.

A state dict is exactly {state, param_groups}: nested layouts and extra top-level keys are lost or refused by
``torch.distributed.checkpoint``. So φ and the mask travel as two more entries of each parameter's state, and are
taken out again before the wrapped optimizer sees it: it would cast a bool mask to the parameter's dtype, and take an
entry without its own keys for an initialised state.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

REFERENCE = "mdgd_reference"
MASK = "mdgd_mask"


def pack(state_dict: dict[str, Any], reference: Sequence[Tensor], masks: Sequence[Tensor] | None) -> dict[str, Any]:
    """The wrapped optimizer's state dict with φ and the mask inside; tensors are shared, not copied."""
    state = dict(state_dict["state"])
    for i, key in enumerate(_keys(state_dict)):
        state[key] = {**state.get(key, {}), REFERENCE: reference[i]}
        if masks is not None:
            state[key][MASK] = masks[i]
    return {**state_dict, "state": state}


def unpack(
    state_dict: dict[str, Any], parameters: Sequence[Tensor]
) -> tuple[dict[str, Any], list[Tensor] | None, list[Tensor] | None]:
    """The opposite of :func:`pack`, checked against the parameters; changes nothing.

    Returns:
        the wrapped optimizer's own state dict, φ and the masks, the latter two None if they are not there.

    Raises:
        ValueError: another number of parameters, a φ or mask of another shape, or one that only some have.
    """
    keys = _keys(state_dict)
    if len(keys) != len(parameters):
        raise ValueError(
            f"the loaded state dict is for {len(keys)} parameters, this optimizer has {len(parameters)}: "
            "build it over the same trainable parameters, in the same order, before loading"
        )
    state: dict[Any, Any] = {}
    for key, entry in state_dict["state"].items():
        own = {k: v for k, v in entry.items() if k not in (REFERENCE, MASK)} if isinstance(entry, dict) else entry
        if own or entry == {}:
            state[key] = own
    inner = {**state_dict, "state": state, "param_groups": [dict(group) for group in state_dict["param_groups"]]}
    reference, masks = (_collect(state_dict, keys, parameters, name) for name in (REFERENCE, MASK))
    return inner, reference, masks


def _keys(state_dict: dict[str, Any]) -> list[Any]:
    return [key for group in state_dict["param_groups"] for key in group["params"]]


def _collect(
    state_dict: dict[str, Any], keys: Sequence[Any], parameters: Sequence[Tensor], name: str
) -> list[Tensor] | None:
    found = [state_dict["state"].get(key, {}).get(name) for key in keys]
    if all(x is None for x in found):
        return None
    for i, (p, x) in enumerate(zip(parameters, found, strict=True)):
        if x is None:
            raise ValueError(f"the loaded state dict has {name!r} for some parameters but not for parameter {i}")
        if x.shape != p.shape:
            raise ValueError(
                f"the loaded state dict's {name!r} of parameter {i} has shape {tuple(x.shape)}, "
                f"the parameter has {tuple(p.shape)}: it was saved from another model or parameter order"
            )
    return found

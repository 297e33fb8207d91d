"""The hyper-parameters that a parameter group holds, and their limits."""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from torch_mdgd.kernels import Role

Update: TypeAlias = Literal["regularize", "reference", "project"]
Space: TypeAlias = Literal["gradient", "step"]
Scope: TypeAlias = Literal["tensor", "global"]
Group: TypeAlias = dict[str, Any]

CHOICES = {"update": get_args(Update), "space": get_args(Space), "scope": get_args(Scope)}
WEIGHTS = ("align", "regularize", "restore")
SETTINGS = (*CHOICES, *WEIGHTS, "history")


def require_whole(name: str, value: Any) -> None:
    """Raise a ValueError that names the argument unless it is a whole number from 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}")


def is_finite(value: Any) -> bool:
    """Whether an argument is a number, and not NaN or Inf."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def complete(group: Group, defaults: Group) -> Group:
    """A copy of a parameter group with the settings that it does not set itself, all of them checked.

    Raises:
        ValueError: a value out of range, or two that exclude each other, naming them.
    """
    merged: Group = {name: group.get(name, defaults[name]) for name in SETTINGS}
    for name, allowed in CHOICES.items():
        if merged[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {merged[name]!r}")
    for name in WEIGHTS:
        if not is_finite(merged[name]) or merged[name] < 0:
            raise ValueError(f"{name} must be a finite number ≥ 0, got {merged[name]!r}")
    require_whole("history", merged["history"])
    if merged["history"] > 1 and merged["space"] == "gradient":
        raise ValueError("history is of directions in step space: pass space='step'")
    if merged["space"] == "step" and merged["update"] != "project":
        raise ValueError(f"space='step' works with update='project' alone, got update={merged['update']!r}")
    if merged["space"] == "gradient" and merged["restore"]:
        raise ValueError("restore is a move in step space: pass space='step', or use align in gradient space")
    if group.get("maximize") and merged["space"] == "gradient":
        raise ValueError("maximize=True would raise the visual loss as well: minimise the negative of your objective")
    return {**group, **merged}


def complete_saved(saved: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """Copies of the groups of a state dict, with the present settings where they have none; see :func:`complete`.

    Raises:
        ValueError: as there; or there is another number of groups.
    """
    if len(saved) != len(groups):
        raise ValueError(f"the loaded state dict has {len(saved)} parameter groups, this optimizer {len(groups)}")
    theirs, ours = ([len(group["params"]) for group in those] for those in (saved, groups))
    if theirs != ours and sum(theirs) == sum(ours):
        raise ValueError(
            f"the parameter groups of the loaded state dict hold {theirs} parameters, those of this optimizer {ours}: "
            "build it with the same groups, in the same order, before loading"
        )
    return [complete(copy, group) for copy, group in zip(saved, groups, strict=True)]


def needs_reference(groups: Sequence[Group], masked: bool) -> bool:
    """Whether an update takes gradients at φ at every step; under a mask (11) takes the place of (9), and does not."""
    return any(
        group["update"] == "reference" or (group["update"] == "regularize" and group["regularize"] and not masked)
        for group in groups
        if group["params"]
    )


def per_parameter(groups: Sequence[Group]) -> list[Group]:
    """The group of each parameter, in parameter order."""
    return [group for group in groups for _ in group["params"]]


def together(groups: Sequence[Group], space: Space) -> list[bool]:
    """For each parameter, whether its inner products are summed with others': scope "global".

    In step space only with those of that space: a move is decoupled by the directions of the parameters that made it.
    """
    return [
        group["scope"] == "global" and (space == "gradient" or group["space"] == space)
        for group in per_parameter(groups)
    ]


def in_step_space(groups: Sequence[Group], gradients: Role) -> list[Tensor | None] | None:
    """The gradients of the parameters in step space, None for the others; None if there is no group of that space."""
    wanted = [group["space"] == "step" for group in per_parameter(groups)]
    return [x if one else None for one, x in zip(wanted, gradients, strict=True)] if any(wanted) else None


def restores(groups: Sequence[Group]) -> Tensor:
    """The restoring move a of each parameter, relative to its step: float64, shape (T,)."""
    return torch.tensor([group["restore"] for group in per_parameter(groups)], dtype=torch.float64)

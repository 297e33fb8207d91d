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


def complete(group: Group, defaults: Group) -> None:
    """Give a parameter group the settings that it does not set itself, and check them all.

    Raises:
        ValueError: a value out of range, or two that exclude each other, naming them.
    """
    merged: Group = {name: group.get(name, defaults[name]) for name in SETTINGS}
    for name, allowed in CHOICES.items():
        if merged[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {merged[name]!r}")
    for name in WEIGHTS:
        value = merged[name]
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be a finite number ≥ 0, got {value!r}")
    history = merged["history"]
    if not isinstance(history, int) or isinstance(history, bool) or history < 1:
        raise ValueError(f"history must be a whole number from 1, got {history!r}")
    if history > 1 and merged["space"] == "gradient":
        raise ValueError("history is of directions in step space: pass space='step'")
    if merged["space"] == "step" and merged["update"] != "project":
        raise ValueError(f"space='step' works with update='project' alone, got update={merged['update']!r}")
    if merged["space"] == "gradient" and merged["restore"]:
        raise ValueError("restore is a move in step space: pass space='step', or use align in gradient space")
    if group.get("maximize") and merged["space"] == "gradient":
        raise ValueError("maximize=True would raise the visual loss as well: minimise the negative of your objective")
    group.update(merged)


def complete_saved(saved: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """Copies of the groups of a state dict, with the present settings where they have none; see :func:`complete`."""
    copies = [dict(group) for group in saved]
    for copy, group in zip(copies, groups, strict=False):
        complete(copy, group)
    return copies


def needs_reference(group: Group, masked: bool) -> bool:
    """Whether the update of this group takes gradients at φ; under a mask it is (11), which does not."""
    regularized = group["update"] == "regularize" and group["regularize"] != 0 and not masked
    return regularized or group["update"] == "reference"


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

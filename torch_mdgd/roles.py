"""The gradients captured for one step, by role, and how they get there from ``.grad``."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torch_mdgd import distributed, sharded
from torch_mdgd.kernels import Role
from torch_mdgd.settings import Group

ROLES = ("task", "visual", "reference_task", "reference_visual")
# g~0, which takes the place of the two reference roles once it is formed.
DECOUPLED_REFERENCE = "reference"


class Captures:
    """One gradient per role and parameter; a role adds up over its captures (micro-batches).

    With them whatever else an MDGDOptimizer knows of a step under way. It never assigns that to itself: Lightning
    calls its methods on a stand-in, which reads the optimizer's attributes and keeps what is assigned.
    """

    def __init__(self) -> None:
        self.gradients: dict[str, list[Tensor | None]] = {}
        self.scale: float | None = None
        self.drift: Tensor | None = None
        self.recording = False
        self.at_reference = False
        # What combine leaves for the step: visual directions in step space; every ``.grad``.
        self.directions: list[Tensor | None] | None = None
        self.combined: list[Tensor | None] | None = None
        # And for the diagnostics, until the next: inner products, and which parameters' are summed.
        self.products: tuple[Tensor, Tensor] | None = None
        self.group: distributed.Group | None = None

    def __bool__(self) -> bool:
        return bool(self.gradients)

    def __getstate__(self) -> dict[str, Any]:
        # A process group belongs to its process, and gradients stay behind when parameters are copied.
        return {**vars(self), "group": None, "combined": None}

    def __contains__(self, role: str) -> bool:
        return role in self.gradients

    def __getitem__(self, role: str) -> list[Tensor | None]:
        return self.gradients[role]

    def absent(self, role: str) -> bool:
        """Whether the role was captured, and no parameter has a gradient in it."""
        return role in self.gradients and all(x is None for x in self.gradients[role])

    def replaced(self, parameters: Sequence[Tensor]) -> bool:
        """Whether none of the gradients that combine left is in its ``.grad`` any more.

        So it is after ``model.zero_grad()``, as when a gradient scaler has skipped a step: what belonged to that step
        is of no use for the next. A warning says so if there were directions, and are other gradients.
        """
        if self.combined is None or any(
            x is not None and x is p.grad for x, p in zip(self.combined, parameters, strict=True)
        ):
            return False
        if self.directions is not None and any(p.grad is not None for p in parameters):
            warnings.warn(
                "step: .grad was replaced since combine(), so this is a step of the wrapped optimizer alone; change "
                "gradients in place, and after a step that was skipped call zero_grad() of the MDGDOptimizer",
                stacklevel=4,
            )
        return True

    def clear(self) -> None:
        """Forget what was captured."""
        self.gradients, self.scale, self.drift, self.recording = {}, None, None, False

    def take(self, roles: Sequence[str], parameters: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """Those of these roles that are there, held no longer; averaged if each rank captured its part of the batch."""
        taken = {role: self.gradients.pop(role) for role in roles if role in self.gradients}
        if self.group is not None:
            # g~0 is of averages already.
            own = [gradients for role, gradients in taken.items() if role != DECOUPLED_REFERENCE]
            distributed.average_(own, parameters, self.group)
        return list(taken.values())

    def require(self, roles: Sequence[str]) -> None:
        """Raise a RuntimeError that names the roles which are not there, themselves or in g~0."""
        there = {*self.gradients, *(ROLES[2:] if DECOUPLED_REFERENCE in self.gradients else ())}
        missing = [role for role in roles if role not in there]
        if missing:
            hint = ""
            if missing[0] in ROLES[2:]:
                hint = " inside reference(); update='project' or regularize=0 works without gradients at the reference"
            raise RuntimeError(
                f"this update needs the {' and '.join(missing)} gradient{'s'[: len(missing) > 1]}, not captured: run "
                f"its backward pass in capture({missing[0].removeprefix('reference_')!r}){hint}"
            )

    @contextmanager
    def record(self, role: str, parameters: Sequence[Tensor], scale: float) -> Iterator[None]:
        """Take what a backward pass inside leaves in ``.grad``; see ``MDGDOptimizer.capture``.

        ``.grad`` holds the role's own buffer meanwhile, so that autograd adds to it and no second buffer lives.
        """
        if self.recording:
            raise RuntimeError("capture: already inside another capture")
        if self.scale not in (None, scale):
            raise ValueError(
                f"capture of {role}: loss scale {scale} differs from {self.scale}, that of this step so far"
            )
        self._open(role, parameters)
        assign(parameters, self.gradients.get(role) or [None] * len(parameters))
        self.recording, self.scale = True, scale
        try:
            yield
            gathered = [p.grad for p in parameters]
            if all(x is None for x in gathered):
                raise RuntimeError(
                    f"capture of {role}: no parameter received a gradient. Is anything that the optimizer holds used "
                    "in this loss? (Reentrant gradient checkpointing can drop gradients silently: use_reentrant=False "
                    "does not.) For a role that is really absent, set_gradients takes a list of None."
                )
            _check(role, gathered, parameters)
            _refuse_overwritten(role, gathered, self.gradients)
            self.gradients[role] = [None if x is None else x.detach() for x in gathered]
        except BaseException:
            self.clear()
            raise
        finally:
            self.recording = False
            assign(parameters, [None] * len(parameters))

    def add(self, given: Mapping[str, Role], parameters: Sequence[Tensor]) -> None:
        """Copy gradients computed elsewhere into their roles, or add them: all of them, or none if one does not fit."""
        for role, gradients in given.items():
            _check(role, gradients, parameters)
            self._open(role, parameters)
        for role, gradients in given.items():
            held = self.gradients.get(role) or [None] * len(parameters)
            self.gradients[role] = [_sum(x, y) for x, y in zip(held, gradients, strict=True)]

    def _open(self, role: str, parameters: Sequence[Tensor]) -> None:
        if role in ROLES[2:] and DECOUPLED_REFERENCE in self.gradients:
            raise RuntimeError(f"capture of {role}: reduce_reference() has closed the reference's roles for this step")
        refuse_stray(parameters)
        # Of a step that was skipped: only memory.
        self.directions = self.combined = None


def warn_of_idle_groups(groups: Sequence[Group], roles: Sequence[Role]) -> None:
    """Not an error: some groups are of modules that not every batch runs."""
    start = 0
    for i, group in enumerate(groups):
        stop = start + len(group["params"])
        trained = any(p.requires_grad for p in group["params"])
        if trained and all(x is None for role in roles for x in role[start:stop]):
            warnings.warn(
                f"combine: no parameter of group {i} received a gradient in any role, so none moves. Is the group used "
                "in the losses? (Reentrant gradient checkpointing can drop gradients: use_reentrant=False does not.)",
                stacklevel=6,
            )
        start = stop


def destination(gradients: Role, parameter: Tensor) -> Tensor | None:
    """Where d goes: over g, into a new buffer if only other roles have a gradient, nowhere if none has."""
    if gradients[0] is not None:
        return gradients[0]
    return None if all(x is None for x in gradients) else torch.zeros_like(parameter)


def refuse_stray(parameters: Sequence[Tensor]) -> None:
    """Raise a RuntimeError if a ``.grad`` holds what no capture took; zeros left by ``zero_grad`` may stay."""
    for i, p in enumerate(parameters):
        if p.grad is not None and bool(sharded.local([p.grad])[0].count_nonzero()):
            raise RuntimeError(
                f"parameter {i} already has a gradient, which no capture took and combine() would overwrite: run "
                "that backward pass inside capture('task'), or call zero_grad() after the last step"
            )


def assign(parameters: Sequence[Tensor], gradients: Role) -> None:
    """Put each gradient in its parameter's ``.grad``."""
    for p, x in zip(parameters, gradients, strict=True):
        p.grad = x


def _refuse_overwritten(role: str, gathered: Role, held: Mapping[str, Role]) -> None:
    """Raise a RuntimeError if a backward pass wrote where another role's gradients were."""
    others = [x for other, gradients in held.items() if other != role for x in sharded.local(gradients)]
    places = {x.data_ptr() for x in others if x is not None and x.numel()}
    if any(x is not None and x.numel() and x.data_ptr() in places for x in sharded.local(gathered)):
        raise RuntimeError(
            f"capture of {role}: this backward pass wrote over gradients that are held for another role, as "
            "DistributedDataParallel does with gradient_as_bucket_view=True: run the passes under its no_sync() and "
            "call average_over(ddp.process_group), or use mdgd_backward, which does"
        )


def _sum(held: Tensor | None, more: Tensor | None) -> Tensor | None:
    if held is None or more is None:
        return held if more is None else more.detach().clone(memory_format=torch.contiguous_format)
    return held.add_(more.detach())


def _check(role: str, gradients: Role, parameters: Sequence[Tensor]) -> None:
    if len(gradients) != len(parameters):
        raise ValueError(f"{role} gradients: {len(gradients)} entries for {len(parameters)} parameters")
    for i, (p, x) in enumerate(zip(parameters, gradients, strict=True)):
        if x is None:
            continue
        if x.layout != torch.strided or x.is_complex():
            raise ValueError(
                f"{role} gradient of parameter {i} is {'complex' if x.is_complex() else 'sparse'}: not supported"
            )
        if x.shape != p.shape:
            raise ValueError(
                f"{role} gradient of parameter {i} has shape {tuple(x.shape)}, the parameter {tuple(p.shape)}"
            )
        if not sharded.same_shards(x, p):
            raise ValueError(f"{role} gradient of parameter {i} is not sharded as the parameter is")

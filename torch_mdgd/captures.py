"""The gradients captured for one step, by kind, and how they get there from ``.grad``."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_mdgd import kernels
from torch_mdgd.kernels import Tensors
from torch_mdgd.parallel import dtensor, ranks
from torch_mdgd.rules.base import KINDS, decoupled_

# g̃₀, which takes the place of the two kinds at the reference once it is formed.
REFERENCE = "reference"
# g + αv, which takes the place of "task" and "visual" where one backward pass gives it.
JOINT = "joint"


@dataclass(frozen=True)
class Step:
    """What one step combines.

    Attributes:
        task: g, T tensors.
        visual: v.
        reference: g̃₀.
        gradients: those of the three that are there, in this order: (g), (g, v) or (g, v, g̃₀).
        d: where the combination goes: over g, into a new buffer if only others have a gradient, nowhere if none has.
        scale: the loss scale that all of them carry.
    """

    task: list[Tensor | None]
    visual: list[Tensor | None]
    reference: list[Tensor | None]
    gradients: list[list[Tensor | None]]
    d: list[Tensor | None]
    scale: float

    def products(self, measured: bool) -> Tensor:
        """Inner products of the R gradients that are there, float64, shape (T, R, R).

        Args:
            measured: whether ⟨g, g⟩ is read where g is the only one; else NaN stands for it, which saves a pass over g.
        """
        if len(self.gradients) > 1 or measured:
            return kernels.inner_products(self.gradients)
        first = next((x for x in self.task if x is not None), None)
        device = torch.device("cpu") if first is None else first.device
        return torch.full((len(self.task), 1, 1), float("nan"), dtype=torch.float64, device=device)


class Captures:
    """One gradient per kind and parameter; a kind adds up over its captures (micro-batches)."""

    def __init__(self) -> None:
        self.gradients: dict[str, list[Tensor | None]] = {}
        self.scale: float | None = None
        self.recording = False
        self.group: ranks.Group | None = None

    def __bool__(self) -> bool:
        return bool(self.gradients)

    def __getstate__(self) -> dict[str, Any]:
        # A process group belongs to its process.
        return {**vars(self), "group": None}

    def empty(self, kind: str) -> bool:
        """Whether the kind was captured, and no parameter has a gradient in it."""
        return kind in self.gradients and all(x is None for x in self.gradients[kind])

    def require_idle(self, verb: str) -> None:
        """Raise a RuntimeError inside a capture: what is captured, and what is in ``.grad``, is not of one step yet."""
        if self.recording:
            raise RuntimeError(f"{verb}: leave capture() first")

    def clear(self) -> None:
        """Forget what was captured."""
        self.gradients, self.scale, self.recording = {}, None, False

    def take(self, kinds: Sequence[str], parameters: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """Gradients of these kinds, held no longer; averaged if each process captured its part of the batch."""
        missing = [None] * len(parameters)
        held = [kind for kind in kinds if kind in self.gradients]
        taken = {kind: self.gradients.pop(kind) for kind in held}
        if self.group is not None:
            # g̃₀ is of averages already.
            own = [gradients for kind, gradients in taken.items() if kind != REFERENCE]
            ranks.average_(own, parameters, self.group)
        return [taken.get(kind, list(missing)) for kind in kinds]

    def close(self, parameters: Sequence[Tensor]) -> Step:
        """All that was captured, for the update; the captures are empty from here on."""
        task, visual, reference = self.take((self._first, "visual", REFERENCE), parameters)
        scale = self.scale or 1.0
        self.clear()
        gradients = [task, visual, reference]
        while len(gradients) > 1 and all(x is None for x in gradients[-1]):
            gradients.pop()
        rows = zip(task, parameters, *gradients[1:], strict=True)
        d = [x if x is not None else _destination(xs, p) for x, p, *xs in rows]
        return Step(task, visual, reference, gradients, d, scale)

    @property
    def _first(self) -> str:
        return JOINT if JOINT in self.gradients else "task"

    def require(self, kinds: Sequence[str]) -> None:
        """Raise a RuntimeError that names the kinds which were captured neither apart, nor in g + αv or g̃₀."""
        if len(self.gradients) > 1 and JOINT in self.gradients:
            raise RuntimeError("a step has either one backward pass of both losses ('joint') or one of each, not both")
        there = {*self.gradients, *(KINDS[2:] if REFERENCE in self.gradients else ())}
        there |= set(KINDS[:2] if JOINT in self.gradients else ())
        missing = [kind for kind in kinds if kind not in there]
        if missing:
            hint = ""
            if missing == ["visual"]:
                hint = "; a step without pictures says so by set_gradients(visual=[None] * T)"
            elif missing[0] in KINDS[2:]:
                hint = " inside reference(); rules.Project() and MDGD(regularize=0) need no gradients at the reference"
            raise RuntimeError(
                f"this update needs the {' and '.join(missing)} gradient{'s'[: len(missing) > 1]}, not captured: run "
                f"its backward pass in capture({missing[0].removeprefix('reference_')!r}){hint}"
            )

    @contextmanager
    def record(
        self, kind: str, parameters: Sequence[Tensor], scale: float, *, drop_zeros: bool = False
    ) -> Iterator[None]:
        """Take what a backward pass inside leaves in ``.grad``; see ``MDGDOptimizer.capture``.

        ``.grad`` holds the kind's own buffer meanwhile, so autograd adds to it and no second buffer lives.

        Args:
            kind: of the gradients.
            parameters: T parameters.
            scale: the loss scale that they carry.
            drop_zeros: hold no buffer for a gradient that is zero throughout.
        """
        if self.recording:
            raise RuntimeError("capture: already inside another capture")
        if self.scale not in (None, scale):
            raise ValueError(
                f"capture of {kind}: loss scale {scale} differs from {self.scale}, that of this step so far"
            )
        self._open(kind, parameters)
        hooked = [i for i, p in enumerate(parameters) if _hooked(p)]
        taken: list[int] = []
        if hooked:
            warnings.warn(
                "a parameter has a hook (register_post_accumulate_grad_hook): it sees the gradient of each backward "
                "pass, and not d, which combine() makes of them",
                stacklevel=4,
            )
        so_far = self.gradients.get(kind) or [None] * len(parameters)
        # What set_gradients was given may be wider than the parameter.
        assign(parameters, [as_grad(x, p) for x, p in zip(so_far, parameters, strict=True)])
        self.recording, self.scale = True, scale
        # After all others of their parameters.
        handles = [parameters[i].register_post_accumulate_grad_hook(_note_taken(i, taken)) for i in hooked]
        try:
            yield
            gathered = [p.grad for p in parameters]
            if taken:
                raise RuntimeError(
                    f"capture of {kind}: a hook (register_post_accumulate_grad_hook) took the gradient of parameter "
                    f"{min(taken)} during the backward pass, as an optimizer that steps there does: remove the hook"
                )
            if all(x is None for x in gathered):
                raise RuntimeError(
                    f"capture of {kind}: no parameter received a gradient. Is anything that the optimizer holds used "
                    "in this loss? (Reentrant gradient checkpointing can drop gradients silently: use_reentrant=False "
                    "does not.) For a kind that is really absent, set_gradients takes a list of None."
                )
            _check(kind, gathered, parameters)
            _refuse_overwritten(kind, gathered, self.gradients)
            held = [None if x is None else x.detach() for x in gathered]
            self.gradients[kind] = _without_zeros(held) if drop_zeros else held
        except BaseException:
            self.clear()
            raise
        finally:
            for handle in handles:
                handle.remove()
            self.recording = False
            assign(parameters, [None] * len(parameters))

    def add(self, given: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """Copy gradients computed elsewhere, or add them: all of them, or none if one does not fit."""
        for kind, gradients in given.items():
            _check(kind, gradients, parameters)
            self._open(kind, parameters)
        for kind, gradients in given.items():
            held = self.gradients.get(kind) or [None] * len(parameters)
            self.gradients[kind] = [_sum(x, y, p) for x, y, p in zip(held, gradients, parameters, strict=True)]

    def reduce_reference(self, parameters: Sequence[Tensor], drift: Callable[[Tensor], Tensor]) -> None:
        """Form g̃₀ (7) of g₀ and v₀, which are held no longer, unless it is formed already.

        Args:
            parameters: T parameters.
            drift: the rule's, of the table of inner products of (g₀, v₀).
        """
        if REFERENCE in self.gradients:
            return
        self.require(KINDS[2:])
        g0, v0 = self.take(KINDS[2:], parameters)
        self.gradients[REFERENCE] = decoupled_(g0, v0, drift)

    def _open(self, kind: str, parameters: Sequence[Tensor]) -> None:
        if kind in KINDS[2:] and REFERENCE in self.gradients:
            raise RuntimeError(f"capture of {kind}: reduce_reference() has formed g̃₀ of this step already")
        refuse_stray(parameters)


def refuse_stray(parameters: Sequence[Tensor]) -> None:
    """Raise a RuntimeError if a ``.grad`` holds what no capture took; zeros left by ``zero_grad`` may stay."""
    for i, p in enumerate(parameters):
        # A sparse gradient has no zeros to leave behind.
        if p.grad is not None and (p.grad.layout != torch.strided or bool(dtensor.local([p.grad])[0].count_nonzero())):
            raise RuntimeError(
                f"parameter {i} already has a gradient, which no capture took and combine() would overwrite: run "
                "that backward pass inside capture('task'), or call zero_grad() after the last step"
            )


def _without_zeros(gradients: list[Tensor | None]) -> list[Tensor | None]:
    zero = (kernels.inner_products([gradients])[:, 0, 0] == 0).tolist()
    return [None if none else x for x, none in zip(gradients, zero, strict=True)]


def _hooked(parameter: Tensor) -> bool:
    """Whether hooks see its gradient as soon as a backward pass has made it."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _note_taken(i: int, taken: list[int]) -> Callable[[Tensor], None]:
    def note(parameter: Tensor) -> None:
        if parameter.grad is None:
            taken.append(i)

    return note


def assign(parameters: Sequence[Tensor], gradients: Tensors) -> None:
    """Put each gradient in its parameter's ``.grad``."""
    for p, x in zip(parameters, gradients, strict=True):
        p.grad = x


def as_grad(gradient: Tensor | None, parameter: Any) -> Tensor | None:
    """What the parameter's ``.grad`` takes: its dtype unless it says otherwise."""
    dtype: torch.dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
    return gradient if gradient is None or gradient.dtype == dtype else gradient.to(dtype)


def _destination(gradients: Tensors, parameter: Tensor) -> Tensor | None:
    """Where d of a parameter without g goes."""
    return None if all(x is None for x in gradients) else torch.zeros_like(parameter)


def _refuse_overwritten(kind: str, gathered: Tensors, held: Mapping[str, Tensors]) -> None:
    """Raise a RuntimeError if a backward pass wrote where another kind's gradients were."""
    others = [x for other, gradients in held.items() if other != kind for x in dtensor.local(gradients)]
    places = {x.data_ptr() for x in others if x is not None and x.numel()}
    if any(x is not None and x.numel() and x.data_ptr() in places for x in dtensor.local(gathered)):
        raise RuntimeError(
            f"capture of {kind}: this backward pass wrote over gradients that are held for another kind, as "
            "DistributedDataParallel does with gradient_as_bucket_view=True: run the passes under its no_sync() and "
            "call average_over(ddp.process_group), or use mdgd_backward, which does"
        )


def _sum(held: Tensor | None, more: Tensor | None, parameter: Tensor) -> Tensor | None:
    if more is None:
        return held
    more = more.detach()
    if held is not None:
        return held.add_(more)
    if type(parameter) not in dtensor.PLAIN:
        return more.clone(memory_format=torch.contiguous_format)
    # In the parameter's layout, as autograd's are: torch's fused optimizers read both in the order of memory.
    return torch.empty_like(parameter, dtype=more.dtype, requires_grad=False).copy_(more)


def _check(kind: str, gradients: Tensors, parameters: Sequence[Tensor]) -> None:
    if len(gradients) != len(parameters):
        raise ValueError(f"{kind} gradients: {len(gradients)} entries for {len(parameters)} parameters")
    for i, (p, x) in enumerate(zip(parameters, gradients, strict=True)):
        if x is None:
            continue
        if x.layout != torch.strided or not x.is_floating_point():
            found = "sparse" if x.layout != torch.strided else "complex" if x.is_complex() else x.dtype
            raise ValueError(f"{kind} gradient of parameter {i} is {found}: not supported")
        if x.shape != p.shape:
            raise ValueError(
                f"{kind} gradient of parameter {i} has shape {tuple(x.shape)}, the parameter {tuple(p.shape)}"
            )
        if not dtensor.same_shards(x, p):
            raise ValueError(f"{kind} gradient of parameter {i} is not sharded as the parameter is")

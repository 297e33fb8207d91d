"""From a fine-tuned model to a file, and from the file onto its base model."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd.delta.file import Delta, Shape, read, safetensors
from torch_mdgd.delta.names import buffers_of, fingerprint, parameters_of
from torch_mdgd.optimizer import MDGDOptimizer
from torch_mdgd.parallel import dtensor


@dataclass
class AppliedDelta:
    """What a delta replaced, so that it can be undone.

    Args:
        model: holds the fine-tune's elements.
        replaced: by name, positions, the base model's values there, and the delta's; positions are None for a buffer.
    """

    model: nn.Module
    replaced: dict[str, tuple[Tensor | None, Tensor, Tensor]]

    @torch.no_grad()
    def undo(self) -> None:
        """Put the base model's elements back, bit for bit; a second call does nothing.

        Raises:
            RuntimeError: an element that the delta wrote is no longer there, as after further training or under a later
                delta, naming its parameter; nothing was changed.
        """
        held = {**parameters_of(self.model), **buffers_of(self.model, large=False)}
        for name, (positions, _, written) in self.replaced.items():
            x = held.get(name)
            if x is None or x.dtype != written.dtype or not _same(_at(x, positions), written):
                raise RuntimeError(
                    f"undo: {name!r} does not hold what this delta wrote: undo later deltas first, last one first, and "
                    "before the model is trained or cast"
                )
        for name, (positions, values, _) in self.replaced.items():
            _put(held[name], positions, values)
        self.replaced = {}


@torch.no_grad()
def save_delta(
    model: nn.Module, path: str | os.PathLike[str], optimizer: MDGDOptimizer | Sequence[MDGDOptimizer]
) -> int:
    """Write the elements in which the model differs from the reference φ, and its small persistent buffers.

    If ``fully_shard`` has sharded the parameters, all ranks call it and the first of them writes. Each gathers one
    parameter at a time, for the fingerprint, and the changed elements.

    Args:
        model: the fine-tuned model, also inside ``torch.compile`` or DistributedDataParallel.
        path: the file, replaced only once it is written whole.
        optimizer: holds φ and the model's trainable parameters; or several that hold them together. Each may be inside
            what accelerate has put around it.

    Returns:
        how many elements of parameters changed.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: an optimizer is no MDGDOptimizer.
        ValueError: a parameter of an optimizer is not the model's, a trainable parameter of the model is none of the
            optimizers', or one belongs to two of them; naming it. Or φ is not held, see
            :meth:`MDGDOptimizer.drop_reference`.
    """
    safetensors()
    optimizers = [_inner(x) for x in (optimizer if isinstance(optimizer, Sequence) else [optimizer])]
    named = parameters_of(model)
    held = _held(named, optimizers)
    tuned = {name: _flat_copy(p) for name, p in held.items()}
    changes = {}
    with ExitStack() as stack:
        for each in optimizers:
            stack.enter_context(each.reference(model))
        base = fingerprint(model)
        for name, p in held.items():
            before = dtensor.local([p])[0].detach().cpu().reshape(-1)
            changed = (_bits(before) != _bits(tuned[name])).nonzero().squeeze(1)
            new = tuned[name][changed].to(p.device)
            positions, values = dtensor.in_whole(changed.to(p.device), [new], p)
            if positions.numel():
                changes[name] = positions.cpu(), values[0].cpu()
    buffers = {
        name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, x in buffers_of(model, large=False).items()
    }
    delta = Delta(base, {name: Shape.of(p) for name, p in named.items()}, changes, buffers)
    divided = any(map(dtensor.is_sharded, held.values()))
    if not divided or torch.distributed.get_rank() == 0:
        delta.write(path)
    if divided:
        torch.distributed.barrier()
    return delta.elements


@torch.no_grad()
def apply_delta(model: nn.Module, path: str | os.PathLike[str]) -> AppliedDelta:
    """Put a fine-tune's elements on its base model, bit for bit.

    Everything is checked before the first element is written.

    Args:
        model: the base model, whole on this process, also inside ``torch.compile`` or DistributedDataParallel.
        path: what :func:`save_delta` wrote.

    Returns:
        what was replaced; its ``undo()`` puts it back.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is no delta, is cut short or was changed, or belongs on another model; naming it. Or the
            model is sharded.
    """
    dtensor.refuse_sharded("apply_delta", list(model.parameters()), "apply it before fully_shard")
    delta = read(path)
    parameters, buffers = parameters_of(model), buffers_of(model, large=False)
    try:
        _require_same("parameter", delta.parameters, {name: Shape.of(p) for name, p in parameters.items()})
        _require_same(
            "buffer", *({name: Shape.of(x) for name, x in those.items()} for those in (delta.buffers, buffers))
        )
    except ValueError as error:
        raise ValueError(f"{path}: made for another model: {error}") from error
    found = fingerprint(model)
    if delta.base != found:
        raise ValueError(
            f"{path}: made for a base model with fingerprint {delta.base[:12]}…, this one has {found[:12]}…: "
            "load the weights that fine-tuning began with, in the same dtype"
        )
    new: dict[str, tuple[Tensor | None, Tensor]] = {**delta.changes}
    new |= {name: (None, x.reshape(-1)) for name, x in delta.buffers.items()}
    held = {**parameters, **buffers}
    replaced = {name: (at, _at(held[name], at), values) for name, (at, values) in new.items()}
    for name, (at, _, values) in replaced.items():
        _put(held[name], at, values)
    return AppliedDelta(model, replaced)


def _inner(optimizer: Any) -> MDGDOptimizer:
    inner = optimizer
    while not isinstance(inner, MDGDOptimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, MDGDOptimizer):
        raise TypeError(f"save_delta: optimizer must be an MDGDOptimizer or several, got {type(optimizer).__name__}")
    return inner


def _held(named: dict[str, Tensor], optimizers: Sequence[MDGDOptimizer]) -> dict[str, Tensor]:
    """The optimizers' parameters by name, in their order."""
    names = {id(p): name for name, p in named.items()}
    out: dict[str, Tensor] = {}
    for which, each in enumerate(optimizers):
        if not each.holds_reference:
            raise ValueError(
                "save_delta: all that was trained is LoRA that began as nothing, and no copy of where its matrices "
                "began is held: save_pretrained of peft writes them. For a delta call set_reference() before training"
            )
        of = f" of optimizer {which}" if len(optimizers) > 1 else " of the optimizer"
        for i, p in enumerate(each.parameters):
            if id(p) not in names:
                raise ValueError(f"save_delta: parameter {i}{of} is not one of this model's")
            if names[id(p)] in out:
                raise ValueError(f"save_delta: {names[id(p)]!r} belongs to two optimizers, and has two references")
            out[names[id(p)]] = p
    free = [name for name, p in named.items() if p.requires_grad and name not in out]
    if free:
        raise ValueError(
            f"save_delta: {free[0]!r} is trainable and belongs to none of the optimizers, so where it began is not "
            f"known ({len(free)} such parameters): pass all optimizers of the model, or freeze what is not trained"
        )
    return out


def _require_same(kind: str, wanted: dict[str, Shape], found: dict[str, Shape]) -> None:
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            there, here = (str(x.get(name, "not there")) for x in (wanted, found))
            raise ValueError(f"its {kind} {name!r} is {there}, this model's is {here}")


def _flat_copy(p: Tensor) -> Tensor:
    part = dtensor.local([p])[0].detach()
    flat: Tensor = part.cpu().reshape(-1)
    return flat.clone() if flat.data_ptr() == part.data_ptr() else flat


def _at(x: Tensor, positions: Tensor | None) -> Tensor:
    """A copy of what stands there, on the CPU; of everything, for None."""
    flat = x.detach().reshape(-1)
    return flat.cpu().clone() if positions is None else flat[positions.long().to(x.device)].cpu()


def _put(x: Tensor, positions: Tensor | None, values: Tensor) -> None:
    if positions is None:
        x.copy_(values.view(x.shape))
        return
    flat = x.reshape(-1)
    flat[positions.long().to(x.device)] = values.to(x.device)
    if flat.data_ptr() != x.data_ptr():
        x.copy_(flat.view(x.shape))


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool(same_bits(x, y).all())


def same_bits(x: Tensor, y: Tensor) -> Tensor:
    """Where two tensors of one shape and dtype have the same bits: bool."""
    return _bits(x) == _bits(y)


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers: NaN equals NaN there, and 0 differs from −0."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])

"""φ, positions and optimizer state for the selected elements alone: MDGD-GM in a tenth of the memory.

With a mask, θ differs from φ only inside it. So the wrapped optimizer is given, for the time of its step, one small
leaf per parameter that holds the selected elements, and what it keeps about them has their size.

Of sharded parameters each rank keeps the selected elements of its own part. Where they stand in a part means nothing
once the parameter is divided otherwise, so a state dict has them gathered, with positions in the whole parameter: it
is that of one process, of any number of processes, and takes what that takes, ρ of the elements, on every rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_mdgd import kernels
from torch_mdgd.kernels import Tensors
from torch_mdgd.masks.base import Mask
from torch_mdgd.parallel import dtensor
from torch_mdgd.rules.base import require_shapes
from torch_mdgd.storage.base import Correct, Entries, Storage, counts, is_per_element, snapshot, warn_of_late
from torch_mdgd.storage.exchange import all_or_none, forget_casts, require_apart
from torch_mdgd.storage.probe import require_elementwise

TOO_EARLY = (
    "compact=True: a step before the mask is chosen would move φ, which is kept inside the mask alone: capture the "
    "gradients of the first step, as mdgd_backward does"
)


class CompactStorage(Storage):
    """Selected elements only; before a mask is chosen nothing at all, since nothing moves until then and θ is φ.

    Args:
        parameters: in parameter order.
        mask: what chooses the mask.
        base: the wrapped optimizer. It has to treat every element of a parameter alike and apart, as SGD, Adam, AdamW,
            NAdam, RAdam, Adamax, RMSprop, Adagrad and Adadelta do; a few steps of a copy show whether it does.

    Raises:
        TypeError: ``base`` is of another kind.
    """

    def __init__(self, parameters: Sequence[Tensor], mask: Mask, base: Optimizer) -> None:
        require_elementwise(base)
        super().__init__(parameters, mask)
        self.trained = [p.requires_grad for p in parameters]
        self._begin()

    def _begin(self) -> None:
        # In this process's shards if parameters are sharded, like all below; how many are in each whole parameter.
        self.positions: list[Tensor] | None = None
        self.sizes = [0] * len(self)
        self.divided = False
        self.reference: list[Tensor] = []

    @property
    def masked(self) -> bool:
        """Whether a mask has been chosen."""
        return self.positions is not None

    def kept(self, parameters: Sequence[Tensor]) -> tuple[int, int]:
        """Selected elements, of all trained ones."""
        return sum(self.sizes), sum(p.numel() for p, one in zip(parameters, self.trained, strict=True) if one)

    def extend(self, parameters: Sequence[Tensor]) -> None:
        """Take in new parameters: before the mask is chosen nothing is held of them."""
        self.trained += [p.requires_grad for p in parameters]
        self.sizes += [0] * len(parameters)

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Move all to the parameters' devices; a ValueError if they were sharded after the mask was chosen."""
        late = [t for t, p in enumerate(parameters) if p.requires_grad and not self.trained[t]]
        if late:
            require_apart(parameters)
        for t in late:
            self.trained[t] = True
            if self.positions is not None:
                warn_of_late(t)
        devices = [p.device for p in self._parts(parameters)]
        if self.positions is not None and any(x.device != d for x, d in zip(self.positions, devices, strict=True)):
            self.positions = [x.to(d) for x, d in zip(self.positions, devices, strict=True)]
            self.reference = [x.to(d) for x, d in zip(self.reference, devices, strict=True)]

    @torch.no_grad()
    def drop(self, zero: Sequence[bool | None]) -> bool:
        """Not done: φ is small as it is, and the positions belong to it."""
        return False

    def exchange_(self, parameters: Sequence[Tensor], places: bool = False) -> None:
        """Swap θ and φ where they can differ; they have no places that could be swapped."""
        self.follow(parameters)
        all_or_none(_swap_, zip(self._parts(parameters), self.positions or (), self.reference, strict=False))
        forget_casts()
        self.swapped = not self.swapped

    def difference(self, parameters: Sequence[Tensor], t: int) -> Tensor:
        """θ − φ at full size, zero outside the mask."""
        p = self._parts(parameters)[t]
        out = torch.zeros_like(p)
        if self.positions is not None:
            _put_(out, self.positions[t], _take(p, self.positions[t]) - self.reference[t])
        return out

    def has_moved(self, parameters: Sequence[Tensor], t: int) -> bool:
        """Whether an element inside the mask differs from φ."""
        p = self._parts(parameters)[t]
        return self.positions is not None and not torch.equal(_take(p, self.positions[t]), self.reference[t])

    def renew(self, parameters: Sequence[Tensor], values: Sequence[Tensor] | None) -> None:
        """A new φ inside the mask; outside it θ is φ, so other values there are refused."""
        self.follow(parameters)
        renewed = []
        for t, p in enumerate(self._parts(parameters)):
            at = _nowhere(p.device) if self.positions is None else self.positions[t]
            new = _take(p, at)
            if values is not None:
                given = dtensor.local([dtensor.shard_like(values[t], parameters[t], p.dtype)])[0]
                new = _take(given, at)
                _put_(given, at, _take(p, at))
                if not torch.equal(given, p):
                    raise ValueError(f"set_reference: value {t} differs from the parameter outside the compact mask")
            renewed.append(new)
        if self.positions is not None:
            self.reference = renewed

    @torch.no_grad()
    def confine(self, masks: Tensors, base: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Once. State that the wrapped optimizer holds of other elements is dropped."""
        parts = self._parts(parameters)
        self.positions = [
            _nowhere(p.device) if mask is None else _positions(mask)
            for p, mask in zip(parts, dtensor.local(masks), strict=True)
        ]
        self.reference = [_take(p, at) for p, at in zip(parts, self.positions, strict=True)]
        self.sizes = counts(masks)
        self.divided = any(map(dtensor.is_sharded, parameters))
        self._carry(base, parameters)

    def _carry(self, base: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Keep the selected elements of the state that the wrapped optimizer holds of whole parameters."""
        for p, at in zip(parameters, self.positions or (), strict=False):
            state = base.state.get(p, {})
            whole = dtensor.local([p])[0].shape
            for name, x in zip(list(state), dtensor.local(list(state.values())), strict=True):
                if is_per_element(name, x, whole):
                    state[name] = _take(x, at)

    def restrict_(self, v: Tensors) -> list[Tensor | None]:
        """The selected elements of v, 1-D."""
        if self.positions is None:
            return list(v)
        rows = zip(v, dtensor.local(v), self.positions, strict=True)
        return [None if x is None else dtensor.as_part(_take(part, at), x) for x, part, at in rows]

    def combine_(self, d: Tensors, gradients: Sequence[Tensors], coefficients: Tensor) -> None:
        """The combination at full size, then zeros outside the mask."""
        kernels.combine_(d, gradients, coefficients)
        self.age += 1
        for x, positions in zip(self._parts(d), self.positions or (), strict=False):
            if x is not None:
                kept = _take(x, positions)
                # A product, so that NaN and Inf outside the mask stay visible, as in the dense mode.
                x.mul_(0)
                _put_(x, positions, kept)

    def step(self, base: Optimizer, parameters: Sequence[Tensor], correct_: Correct | None) -> None:
        """The wrapped optimizer steps on one small leaf for each parameter."""
        gradients = dtensor.local([p.grad for p in parameters])
        if self.positions is None:
            if any(g is not None and bool(g.count_nonzero()) for g in gradients):
                raise RuntimeError(TOO_EARLY)
            _step_on_zeros(base, [p for p, g in zip(self._parts(parameters), gradients, strict=True) if g is not None])
            return
        with self._selected(base, parameters, gradients) as leaves:
            live = [None if g is None else leaf.data for leaf, g in zip(leaves, gradients, strict=True)]
            before = [None if correct_ is None or x is None else snapshot(x) for x in live]
            base.step()
            if correct_ is not None:
                correct_(*(_as_parts(values, parameters) for values in (live, before)))

    def switch(self, base: Optimizer, parameters: Sequence[Tensor], mode: Callable[[], Any]) -> None:
        """Run ``base.train`` or ``base.eval`` on the selected elements."""
        if self.positions is None:
            mode()
            return
        with self._selected(base, parameters, [torch.zeros_like(p) for p in self._parts(parameters)]):
            mode()

    def _parts(self, tensors: Tensors) -> list[Any]:
        held = [x for x in tensors if x is not None]
        if held and self.positions is not None and self.divided != any(map(dtensor.is_sharded, held)):
            raise ValueError(
                "compact=True: parameters were sharded after the mask was chosen, and positions in the whole mean "
                "nothing in a shard: shard the model first, then wrap its optimizer"
            )
        return dtensor.local(tensors)

    @contextmanager
    def _selected(
        self, base: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> Iterator[list[nn.Parameter]]:
        """Inside, the wrapped optimizer holds one leaf of the selected elements in each parameter's place.

        What becomes of the leaves that have a gradient is put back.
        """
        parts, positions = self._parts(parameters), self.positions or []
        leaves = []
        for part, grad, at in zip(parts, gradients, positions, strict=True):
            x = _take(part, at)
            # Whole numbers, as of a model in 4 bits, are never trained.
            leaf = nn.Parameter(x, requires_grad=x.is_floating_point() or x.is_complex())
            # Also of no elements: a parameter counts its steps, as in the dense mode.
            if grad is not None:
                leaf.grad_dtype = grad.dtype
                leaf.grad = _take(grad, at)
            leaves.append(leaf)
        self._exchange_keys(base, parameters, leaves)
        try:
            yield leaves
        finally:
            self._exchange_keys(base, leaves, parameters)
        for part, leaf, at, grad in zip(parts, leaves, positions, gradients, strict=True):
            if grad is not None:
                _put_(part, at, leaf)

    def _exchange_keys(self, base: Optimizer, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Let the wrapped optimizer's groups and state be about other tensors."""
        found = iter(new)
        for group in base.param_groups:
            group["params"] = [next(found) for _ in group["params"]]
        for x, y in zip(old, new, strict=True):
            if x in base.state:
                base.state[y] = base.state.pop(x)

    def save(self, base: Optimizer) -> tuple[dict[str, Any], dict[str, Tensors]]:
        """φ and the positions, with the state of the selected elements, of all processes together."""
        parameters = [p for group in base.param_groups for p in group["params"]]
        self.follow(parameters)
        if self.positions is None:
            # So that torch.distributed.checkpoint, which loads what a fresh optimizer has, fails and skips nothing.
            return base.state_dict(), {"positions": [_nowhere() if one else None for one in self.trained]}
        inner = base.state_dict()
        positions: list[Tensor | None] = [*self.positions]
        reference: list[Tensor | None] = [*self.reference]
        for i, p in enumerate(parameters):
            if not self.trained[i]:
                positions[i] = reference[i] = None
            elif dtensor.is_sharded(p):
                held = inner["state"].get(i, {})
                positions[i], both = _gathered(self.positions[i], {**held, "φ": self.reference[i]}, p)
                reference[i] = both.pop("φ")
                inner["state"] |= {i: both} if both else {}
        return inner, {"positions": positions, "reference": reference}

    def load(self, inner: dict[str, Any], found: Entries, base: Optimizer, parameters: Sequence[Tensor]) -> bool:
        """The opposite of :meth:`save`; without positions there, the present mask stays."""
        if "reference" in found and "positions" not in found:
            raise ValueError("the state dict was saved with compact=False: build the MDGDOptimizer so, too")
        entries = [entry for entry in inner["state"].values() if isinstance(entry, dict)]
        divided = any(dtensor.is_sharded(x) for entry in entries for x in entry.values())
        if divided and "positions" in found:
            raise ValueError(
                "the state dict of a compact run was divided over processes by what loaded it, as full_state_dict=True "
                "of set_optimizer_state_dict does: leave that out"
            )
        if "reference" not in found:
            base.load_state_dict(inner)
            if "positions" in found and self.scored:
                # It was saved before a mask was chosen.
                self.trained = [x is not None for x in found["positions"]]
                self._begin()
            self._carry(base, parameters)
            # Before the first step nothing has moved, and no φ is missed.
            return "positions" in found or not inner["state"]
        positions = [_nowhere() if x is None else x for x in found["positions"]]
        require_shapes("reference", found["reference"], [x.shape for x in positions])
        for i, (p, x) in enumerate(zip(parameters, positions, strict=True)):
            if x.numel() and not (int(x.min()) >= 0 and int(x.max()) < p.numel()):
                raise ValueError(f"the state dict's positions of parameter {i} lie outside its {p.numel()} elements")
        parts = dtensor.local(parameters)
        self.sizes = [x.numel() for x in positions]
        self.trained = [x is not None for x in found["positions"]]
        self.positions = [x.to(p.device, copy=True) for p, x in zip(parts, positions, strict=True)]
        self.reference = [
            p.new_zeros(0) if x is None else x.to(p.device, p.dtype, copy=True)
            for p, x in zip(parts, found["reference"], strict=True)
        ]
        base.load_state_dict(inner)
        self.divided = any(map(dtensor.is_sharded, parameters))
        for i, p in enumerate(parameters):
            if dtensor.is_sharded(p):
                held = {**base.state.get(p, {}), "φ": self.reference[i]}
                self.positions[i], own = _own(self.positions[i], held, p)
                self.reference[i] = own.pop("φ")
                if own:
                    base.state[p] = own
        return True


def _step_on_zeros(base: Optimizer, parts: Sequence[Tensor]) -> None:
    """A step that makes state, as torch.distributed.checkpoint does; weight decay and momentum would move all the same.

    Raises:
        RuntimeError: it moves something; it is put back.
    """
    before = [snapshot(p) for p in parts]
    base.step()
    if not all(map(torch.equal, parts, before)):
        for p, x in zip(parts, before, strict=True):
            p.detach().copy_(x)
        raise RuntimeError(TOO_EARLY)


def _nowhere(device: torch.device | str = "cpu") -> Tensor:
    return torch.zeros(0, dtype=torch.int32, device=device)


def _positions(mask: Tensor) -> Tensor:
    index = mask.reshape(-1).nonzero().squeeze(1)
    return index.to(torch.int32) if mask.numel() <= torch.iinfo(torch.int32).max else index


def _swap_(p: Tensor, positions: Tensor, values: Tensor) -> None:
    held = _take(p, positions)
    _put_(p, positions, values)
    values.copy_(held)


def _take(x: Tensor, positions: Tensor) -> Tensor:
    return x.detach().take(positions.long())


def _put_(x: Tensor, positions: Tensor, values: Tensor) -> None:
    values = values.detach()
    # Unlike put_, both are there in deterministic mode too.
    if x.is_contiguous():
        x.detach().view(-1).index_copy_(0, positions.long(), values)
    else:
        x.detach().index_put_(torch.unravel_index(positions.long(), x.shape), values)


def _gathered(positions: Tensor, state: dict[Any, Any], like: Tensor) -> tuple[Tensor, dict[Any, Any]]:
    """Positions in the whole of a sharded parameter, and what is held of the elements there, from all ranks' parts."""
    names = [name for name, x in state.items() if _is_of(x, positions)]
    whole, values = dtensor.in_whole(positions, [state[name].reshape(-1) for name in names], like)
    return whole, {**state, **dict(zip(names, values, strict=True))}


def _own(positions: Tensor, state: dict[Any, Any], like: Tensor) -> tuple[Tensor, dict[Any, Any]]:
    """The opposite of :func:`_gathered`: positions in this rank's part, and what is held of the elements there."""
    index = dtensor.indices(like)
    at = torch.searchsorted(positions.long(), index).clamp_(max=max(positions.numel() - 1, 0))
    here = positions[at] == index if positions.numel() else torch.zeros_like(index, dtype=torch.bool)
    each = {name: x.reshape(-1)[at[here]] for name, x in state.items() if _is_of(x, positions)}
    return _positions(here), {**state, **each}


def _is_of(value: Any, positions: Tensor) -> bool:
    """Whether a value in an optimizer's state has an element for each position."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() == positions.numel()


def _as_parts(values: Tensors, like: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if x is None else dtensor.as_part(x, p) for x, p in zip(values, like, strict=True)]

"""φ, positions and optimizer state for the selected numbers alone: MDGD-GM in a tenth of the memory.

With a mask, θ differs from φ only inside it. So the wrapped optimizer is given, for the time of its step, one small
leaf per parameter that holds the selected numbers, and what it keeps about them has their size.

Of sharded parameters each rank keeps the selected numbers of its own part. Where they stand in a part means nothing
once the parameter is divided otherwise, so a state dict has them gathered, with positions in the whole parameter: it
is that of one process, of any number of processes, and takes what that takes, ρ of the numbers, on every rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import ASGD, Adafactor, Muon, Optimizer, Rprop, SparseAdam

from torch_mdgd import checkpoint, sharded
from torch_mdgd.decoupling import Decouple
from torch_mdgd.kernels import Role
from torch_mdgd.reference import all_or_none, forget_casts, snapshot

# They look at a parameter's shape, expect sparse gradients, or keep state that cannot begin at zero.
UNSUPPORTED = (Adafactor, ASGD, Muon, Rprop, SparseAdam)


class CompactStorage:
    """Selected numbers only; before a mask is chosen nothing at all, since nothing moves until then and θ is φ.

    Args:
        parameters: in parameter order.
        base: the wrapped optimizer. It has to treat every number of a parameter alike and apart, with a state that
            begins at zero: true of SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad and Adadelta. That of
            another library is taken at its word.

    Raises:
        TypeError: ``base`` is known to be of another kind.
    """

    def __init__(self, parameters: Sequence[Tensor], base: Optimizer) -> None:
        if isinstance(base, UNSUPPORTED):
            raise TypeError(
                f"compact=True needs an optimizer that treats every number of a parameter alike and apart, which "
                f"{type(base).__name__} does not: use compact=False, the dense mode"
            )
        self.count = len(parameters)
        # In this rank's parts if parameters are sharded, like all below; how many are in each whole one.
        self.positions: list[Tensor] | None = None
        self.sizes = [0] * self.count
        self.divided = False
        self.leaves: list[nn.Parameter] = []
        # Numbers that some earlier mask let move keep their φ too.
        self.moved: list[Tensor] = []
        self.reference: list[Tensor] = []

    def __len__(self) -> int:
        return self.count

    @property
    def masked(self) -> bool:
        """Whether a mask has been chosen."""
        return self.positions is not None

    def kept(self, parameters: Sequence[Tensor]) -> tuple[int, int]:
        """How many numbers may move, of how many."""
        return sum(self.sizes), sum(p.numel() for p in parameters)

    def extend(self, parameters: Sequence[Tensor]) -> None:
        """Take in new parameters, at their values now."""
        self.count += len(parameters)
        self.sizes += [0] * len(parameters)

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Hold all on the parameters' devices; raise a ValueError if they were sharded after the mask was chosen."""
        parts = self._parts(parameters)
        if self.positions is not None and any(x.device != p.device for x, p in zip(self.positions, parts, strict=True)):
            shared = [x is y for x, y in zip(self.moved, self.positions, strict=True)]
            for name in ("positions", "moved", "reference"):
                setattr(self, name, [x.to(p.device) for x, p in zip(getattr(self, name), parts, strict=True)])
            self.moved = [y if one else x for one, x, y in zip(shared, self.moved, self.positions, strict=True)]

    @torch.no_grad()
    def exchange_(self, parameters: Sequence[Tensor]) -> None:
        """Swap θ and φ where they can differ."""
        self.follow(parameters)
        all_or_none(_swap_, zip(self._parts(parameters), self.moved, self.reference, strict=False))
        forget_casts()

    @torch.no_grad()
    def choose(self, masks: Sequence[Tensor], base: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Let only the numbers inside these masks move from now on; state of those that could before is kept."""
        parts = self._parts(parameters)
        positions = [_positions(mask) for mask in sharded.local(masks)]
        old = self.positions or [torch.arange(p.numel(), device=p.device) for p in parts]
        holders = self.leaves or parameters
        leaves = [_leaf(p) for p in parts]
        for holder, leaf, before, after in zip(holders, leaves, old, positions, strict=True):
            if holder in base.state:
                base.state[leaf] = _carried(base.state.pop(holder), before, after)
        if not self.moved:
            # One tensor for both, until a second mask lets other numbers move.
            self.moved, self.reference = list(positions), [_take(p, x) for p, x in zip(parts, positions, strict=True)]
        for i, p in enumerate(parts):
            fresh = positions[i][~torch.isin(positions[i], self.moved[i])]
            if fresh.numel():
                self.moved[i], order = torch.cat([self.moved[i], fresh]).sort()
                self.reference[i] = torch.cat([self.reference[i], _take(p, fresh)])[order]
        self.positions, self.leaves, self.sizes = positions, leaves, sharded.counts(masks)
        self.divided = any(map(sharded.is_sharded, parameters))

    def restrict_(self, v: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The directions v inside the mask, at its size."""
        if self.positions is None:
            return list(v)
        rows = zip(v, sharded.local(v), self.positions, strict=True)
        return [None if x is None else sharded.as_part(_take(part, at), x) for x, part, at in rows]

    def combine_(self, d: Role, roles: Sequence[Role], coefficients: Tensor) -> None:
        """Write the linear combination of the roles, under the mask, over d."""
        sharded.combine_(d, roles, coefficients)
        for x, positions in zip(self._parts(d), self.positions or (), strict=False):
            if x is not None:
                kept = _take(x, positions)
                # A product, so that NaN and Inf outside the mask stay visible, as in the dense mode.
                x.mul_(0)
                _put_(x, positions, kept)

    def step(self, base: Optimizer, parameters: Sequence[Tensor], decouple_: Decouple | None) -> None:
        """One step of the wrapped optimizer on the selected numbers, and what is to be done to its moves."""
        if self.positions is None:
            base.step()
            return
        parts, gradients = self._parts(parameters), sharded.local([p.grad for p in parameters])
        for p, grad, leaf, positions in zip(parts, gradients, self.leaves, self.positions, strict=True):
            leaf.data = _take(p, positions)
            # Also of no numbers: a parameter counts its steps, as in the dense mode, before a later mask selects some.
            leaf.grad = None if grad is None else _take(grad, positions)
        before = None if decouple_ is None else snapshot(self._values(parameters))
        try:
            with self._in_place_of_parameters(base):
                base.step()
            if decouple_ is not None and before is not None:
                decouple_(self._values(parameters), before)
            for p, leaf, positions in zip(parts, self.leaves, self.positions, strict=True):
                _put_(p, positions, leaf)
        finally:
            for leaf in self.leaves:
                leaf.grad, leaf.data = None, leaf.data.new_empty(0)

    def _parts(self, tensors: Role) -> list[Any]:
        held = [x for x in tensors if x is not None]
        if held and self.positions is not None and self.divided != any(map(sharded.is_sharded, held)):
            raise ValueError(
                "compact=True: parameters were sharded after the mask was chosen, and positions in the whole mean "
                "nothing in a shard: shard the model first, then wrap its optimizer"
            )
        return sharded.local(tensors)

    def _values(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [sharded.as_part(leaf.data, p) for leaf, p in zip(self.leaves, parameters, strict=True)]

    @contextmanager
    def _in_place_of_parameters(self, base: Optimizer) -> Iterator[None]:
        groups = base.param_groups
        held = [group["params"] for group in groups]
        leaves = iter(self.leaves)
        for group, parameters in zip(groups, held, strict=True):
            group["params"] = [next(leaves) for _ in parameters]
        try:
            yield
        finally:
            # The groups anew: loading a state dict replaces them.
            for group, parameters in zip(base.param_groups, held, strict=True):
                group["params"] = parameters

    def save(self, base: Optimizer) -> dict[str, Any]:
        """The wrapped optimizer's state dict with φ and the positions in it, of all ranks together: all call it."""
        if self.positions is None:
            # So that torch.distributed.checkpoint, which loads what a fresh optimizer has, fails and skips nothing.
            nowhere = [torch.zeros(0, dtype=torch.int32)] * self.count
            return checkpoint.pack(base.state_dict(), {"positions": nowhere})
        parameters = [p for group in base.param_groups for p in group["params"]]
        with self._in_place_of_parameters(base):
            inner = base.state_dict()
        own = {"positions": list(self.positions), "moved": list(self.moved), "reference": list(self.reference)}
        for i, p in enumerate(parameters):
            if sharded.is_sharded(p):
                moved, [reference] = sharded.in_whole(self.moved[i], [self.reference[i]], p)
                positions, state = _gathered(self.positions[i], inner["state"].get(i, {}), p)
                if self.moved[i] is self.positions[i]:
                    positions = moved
                own["positions"][i], own["moved"][i], own["reference"][i] = positions, moved, reference
                inner["state"] |= {i: state} if state else {}
        return checkpoint.pack(inner, own)

    def load(self, state_dict: dict[str, Any], base: Optimizer, parameters: Sequence[Tensor]) -> bool:
        """The opposite of :meth:`save`; returns whether φ was there. See ``MDGDOptimizer.load_state_dict``."""
        inner, found = checkpoint.unpack(state_dict, parameters)
        if not any(x.numel() for x in found.get("positions", ())):
            if "reference" in found:
                raise ValueError("the state dict was saved with compact=False: build the MDGDOptimizer so, too")
            base.load_state_dict(inner)
            self.__init__(parameters, base)  # type: ignore[misc]
            # Before the first step nothing has moved, and no φ is missed.
            return not inner["state"]
        if any(sharded.is_sharded(x) for entry in inner["state"].values() for x in entry.values()):
            raise ValueError(
                "the state dict of a compact run was divided over processes by what loaded it, as full_state_dict=True "
                "of set_optimizer_state_dict does: leave that out"
            )
        checkpoint.require_shapes("reference", found["reference"], [x.shape for x in found["moved"]])
        for i, (p, *indices) in enumerate(zip(parameters, found["positions"], found["moved"], strict=True)):
            for x in indices:
                if x.numel() and not (int(x.min()) >= 0 and int(x.max()) < p.numel()):
                    raise ValueError(f"the state dict's positions of parameter {i} lie outside its {p.numel()} numbers")
        parts = sharded.local(parameters)
        self.leaves, self.sizes = [_leaf(p) for p in parts], [x.numel() for x in found["positions"]]
        for name in ("positions", "moved", "reference"):
            setattr(self, name, [x.to(p.device, copy=True) for p, x in zip(parts, found[name], strict=True)])
        with self._in_place_of_parameters(base):
            base.load_state_dict(inner)
        self._divide(base, parameters)
        self.divided = any(map(sharded.is_sharded, parameters))
        pairs = zip(self.moved, self.positions or (), strict=True)
        self.moved = [positions if torch.equal(moved, positions) else moved for moved, positions in pairs]
        self.reference = [x.to(p.dtype) for p, x in zip(parts, self.reference, strict=True)]
        return True

    def _divide(self, base: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Of what is held of whole parameters, keep this rank's."""
        for i, (p, leaf) in enumerate(zip(parameters, self.leaves, strict=True)):
            if self.positions is not None and sharded.is_sharded(p):
                state = base.state.get(leaf, {})
                self.positions[i], own = _own(self.positions[i], state, p)
                if state:
                    base.state[leaf] = own
                self.moved[i], own = _own(self.moved[i], {"reference": self.reference[i]}, p)
                self.reference[i] = own["reference"]


def _leaf(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().new_empty(0))


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
    x.put_(positions.long(), values.detach())


def _gathered(positions: Tensor, state: dict[Any, Any], like: Tensor) -> tuple[Tensor, dict[Any, Any]]:
    """Positions in the whole of a sharded parameter, and what is held of the numbers there, from all ranks' parts."""
    names = [name for name, x in state.items() if _is_of(x, positions)]
    whole, values = sharded.in_whole(positions, [state[name].reshape(-1) for name in names], like)
    return whole, {**state, **dict(zip(names, values, strict=True))}


def _own(positions: Tensor, state: dict[Any, Any], like: Tensor) -> tuple[Tensor, dict[Any, Any]]:
    """The opposite of :func:`_gathered`: positions in this rank's part, and what is held of the numbers there."""
    index = sharded.indices(like)
    at = torch.searchsorted(positions.long(), index).clamp_(max=max(positions.numel() - 1, 0))
    here = positions[at] == index if positions.numel() else torch.zeros_like(index, dtype=torch.bool)
    each = {name: x.reshape(-1)[at[here]] for name, x in state.items() if _is_of(x, positions)}
    return _positions(here), {**state, **each}


def _is_of(value: Any, positions: Tensor) -> bool:
    """Whether a value in an optimizer's state has a number for each position."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() == positions.numel()


def _carried(state: dict[Any, Any], before: Tensor, after: Tensor) -> dict[Any, Any]:
    """State of the numbers at ``before`` for those at ``after``: kept where both have them, zero for new ones.

    Numbers of a parameter at large, such as the step count, stay as they are.
    """
    at = torch.searchsorted(before, after).clamp(max=max(before.numel() - 1, 0))
    stays = before[at] == after if before.numel() else torch.zeros_like(after, dtype=torch.bool)
    out = {}
    for name, value in zip(state, sharded.local(list(state.values())), strict=True):
        if _is_of(value, before):
            out[name] = torch.zeros(after.numel(), dtype=value.dtype, device=value.device)
            out[name][stays] = value.reshape(-1)[at[stays]]
        else:
            out[name] = value
    return out

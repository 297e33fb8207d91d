"""φ and the mask at full size: what any optimizer, elementwise or not, can be wrapped with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_mdgd import kernels
from torch_mdgd.kernels import Tensors
from torch_mdgd.masks.base import Mask, restore_outside_
from torch_mdgd.parallel import dtensor
from torch_mdgd.rules.base import as_count, count_of, require_shapes
from torch_mdgd.storage.base import Correct, Entries, Storage, counts, is_per_element, snapshot, warn_of_late
from torch_mdgd.storage.exchange import exchange_, require_apart

AGE, DROPPED = "mask_age", "dropped"
CODES = (None, True, False)
"""What is saved of a parameter whose φ is held, is zero, and is the present value, by number."""


class DenseStorage(Storage):
    """A copy of every trained element and, under a mask, one bool for each."""

    def __init__(self, parameters: Sequence[Tensor], mask: Mask | None = None) -> None:
        super().__init__(parameters, mask)
        self.reference: list[Tensor | None] = [None] * len(parameters)
        # Of a parameter whose φ is not held: whether it is zero.
        self.zero: list[bool | None] = [None] * len(parameters)
        # What is exchanged, while it is.
        self._values: list[Tensor | None] = []
        self._hold(None)
        self.follow(parameters)

    def _hold(self, masks: Tensors | None) -> None:
        self.masks = None if masks is None else list(masks)
        # Now, when all processes are here: diagnostics may be asked for in one.
        self._kept = sum(counts(self.masks or []))

    # Where φ is kept: with its parameter.

    def _snapshot(self, p: Tensor) -> Tensor:
        """φ of a parameter, from its values now."""
        return snapshot(p)

    def _copy(self, x: Tensor, p: Tensor) -> Tensor:
        """φ of a parameter, from other values."""
        return dtensor.shard_like(x, p, p.dtype)

    def _follow(self, held: Tensor, p: Tensor) -> Tensor:
        """φ of a parameter that may have been moved or sharded since."""
        return held if dtensor.same_place(held, p) else dtensor.shard_like(held, p)

    @property
    def masked(self) -> bool:
        """Whether a mask has been chosen."""
        return self.masks is not None

    def kept(self, parameters: Sequence[Tensor]) -> tuple[int, int]:
        """Elements inside the mask, of all trained ones."""
        return self._kept, sum(p.numel() for p, one in zip(parameters, self.trained, strict=True) if one)

    def extend(self, parameters: Sequence[Tensor]) -> None:
        """Copy the new parameters."""
        self.trained += [p.requires_grad for p in parameters]
        self.zero += [None] * len(parameters)
        self.reference += [self._snapshot(p) if p.requires_grad else None for p in parameters]

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Move φ and the mask to where the parameters are."""
        rows = enumerate(zip(parameters, self.reference, self.zero, strict=True))
        late = [t for t, (p, held, zero) in rows if held is None and zero is None and p.requires_grad]
        if late:
            require_apart(parameters)
        for t in late:
            self.reference[t], self.trained[t] = self._snapshot(parameters[t]), True
            if self.masks is not None:
                warn_of_late(t)
                self.masks[t] = torch.zeros_like(parameters[t], dtype=torch.bool)
        pairs = zip(self.reference, parameters, strict=True)
        self.reference = [x if x is None else self._follow(x, p) for x, p in pairs]
        if self.masks is not None:
            self.masks = [
                m if m is None or dtensor.same_place(m, p) else dtensor.shard_like(m, p)
                for m, p in zip(self.masks, parameters, strict=True)
            ]

    def drop(self, zero: Sequence[bool | None]) -> bool:
        """Not under a mask, which is chosen by gradients at φ or lies in a checkpoint with it."""
        if self.mask is not None:
            return False
        self.zero = list(zero)
        self.reference = [x if one is None else None for x, one in zip(self.reference, zero, strict=True)]
        return True

    @property
    def dropped(self) -> bool:
        """Of all that are trained."""
        there = [zero is not None for zero, one in zip(self.zero, self.trained, strict=True) if one]
        return all(there) and bool(there)

    def exchange_(self, parameters: Sequence[Tensor], places: bool = False) -> None:
        """Swap each trained parameter with its copy, or with zero."""
        self.follow(parameters)
        if not self.swapped:
            self._values = [
                torch.zeros_like(p) if z else x for p, x, z in zip(parameters, self.reference, self.zero, strict=True)
            ]
        exchange_(parameters, self._values, places)
        self.swapped = not self.swapped
        if not self.swapped:
            self._values = []

    def difference(self, parameters: Sequence[Tensor], t: int) -> Tensor:
        """At full size, of a sharded parameter this process's shard."""
        zero = self.zero[t]
        if zero is not None:
            return snapshot(parameters[t]) if zero else torch.zeros_like(parameters[t])
        p, x = dtensor.local([parameters[t], self.reference[t]])
        # One that has never been trained has not moved.
        out: Tensor = torch.zeros_like(p) if x is None else p.detach() - x.to(p.device)
        return out

    def has_moved(self, parameters: Sequence[Tensor], t: int) -> bool:
        """At full size, of a sharded parameter this process's shard."""
        zero = self.zero[t]
        if zero is not None:
            return zero and bool(parameters[t].detach().any())
        p, x = dtensor.local([parameters[t], self.reference[t]])
        return not torch.equal(p.detach(), x.to(p.device))

    def renew(self, parameters: Sequence[Tensor], values: Sequence[Tensor] | None) -> None:
        """Copy the values, also of what was dropped."""
        self.zero = [None] * len(parameters)
        self.follow(parameters)
        for t, p in enumerate(parameters):
            if self.trained[t]:
                self.reference[t] = self._snapshot(p) if values is None else self._copy(values[t], p)

    def confine(self, masks: Tensors, base: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Hold the masks; state of an element that an earlier mask held still begins anew."""
        for p, old, new in zip(parameters, self.masks or (), masks, strict=False):
            for name, value in base.state.get(p, {}).items():
                if old is not None and new is not None and is_per_element(name, value, p.shape):
                    value.mul_(old & new)
        self._hold(masks)
        self.age = 0

    def restrict_(self, v: Tensors) -> list[Tensor | None]:
        """The directions v with zeros outside the mask, in place."""
        for x, mask in zip(v, self.masks or (), strict=False):
            if x is not None and mask is not None:
                x.mul_(mask)
        return list(v)

    def combine_(self, d: Tensors, gradients: Sequence[Tensors], coefficients: Tensor) -> None:
        """The combination under the mask, in one pass."""
        kernels.combine_(d, gradients, coefficients, self.masks)
        self.age += 1

    def step(self, base: Optimizer, parameters: Sequence[Tensor], correct_: Correct | None) -> None:
        """Step; elements outside the mask get back their values."""
        if self.masks is None and correct_ is None:
            base.step()
            return
        live = [p if p.grad is not None else None for p in parameters]
        before = [None if p is None else snapshot(p) for p in live]
        base.step()
        if self.masks is not None:
            moved = [
                (p, x, mask)
                for p, x, mask in zip(live, before, self.masks, strict=True)
                if p is not None and x is not None and mask is not None
            ]
            restore_outside_(*zip(*moved, strict=True)) if moved else None
        if correct_ is not None:
            correct_(live, before)

    def switch(self, base: Optimizer, parameters: Sequence[Tensor], mode: Callable[[], Any]) -> None:
        """Run ``base.train`` or ``base.eval``; elements outside the mask get back their values."""
        self.follow(parameters)
        held = [
            (p, snapshot(p), mask) for p, mask in zip(parameters, self.masks or (), strict=False) if mask is not None
        ]
        mode()
        if held:
            restore_outside_(*zip(*held, strict=True))

    def save(self, base: Optimizer) -> tuple[dict[str, Any], dict[str, Tensors]]:
        """φ and the mask, or a place for it, and how old it is if it is chosen anew."""
        self.follow([p for group in base.param_groups for p in group["params"]])
        own: dict[str, Tensors] = {"reference": self.reference}
        if any(zero is not None for zero in self.zero):
            # Each parameter has both entries, so that none can be missed.
            own["reference"] = [
                x if x is not None or not one else torch.zeros(0, dtype=torch.float32, device="cpu")
                for x, one in zip(self.reference, self.trained, strict=True)
            ]
            own[DROPPED] = [
                as_count(CODES.index(zero)) if one else None for zero, one in zip(self.zero, self.trained, strict=True)
            ]
        if self.masks is not None:
            own["mask"] = self.masks
        elif self.mask is not None:
            # torch.distributed.checkpoint loads what a fresh optimizer has, and nothing else.
            own["mask"] = [None if x is None else torch.zeros_like(x, dtype=torch.bool) for x in self.reference]
        if self.mask is not None and self.mask.refresh is not None:
            own[AGE] = [as_count(self.age) if one else None for one in self.trained]
        return base.state_dict(), own

    def load(self, inner: dict[str, Any], found: Entries, base: Optimizer, parameters: Sequence[Tensor]) -> bool:
        """The opposite of :meth:`save`; without a mask there, the present one stays."""
        if "positions" in found:
            raise ValueError("the state dict was saved with compact=True: build the MDGDOptimizer so, too")
        codes = found.get(DROPPED, [None] * len(parameters))
        zero = [None if code is None else CODES[int(code)] for code in codes]
        for name in ("reference", "mask"):
            if name in found:
                gone = zero if name == "reference" else [None] * len(zero)
                require_shapes(
                    name, found[name], [p.shape if z is None else (0,) for p, z in zip(parameters, gone, strict=True)]
                )
        masks: Tensors = found.get("mask", [])
        chosen = any(counts(masks))
        if chosen and self.mask is None:
            raise ValueError("the state dict was saved with a mask: build the MDGDOptimizer with it, too")
        base.load_state_dict(inner)
        for t, (x, p) in enumerate(zip(found.get("reference", ()), parameters, strict=False)):
            # One that had not been trained there begins when it is trained, as any that is unfrozen.
            self.zero[t], self.trained[t] = zero[t], x is not None
            self.reference[t] = None if x is None or zero[t] is not None else self._copy(x, p)
        if chosen:
            pairs = zip(masks, parameters, strict=True)
            self._hold([None if x is None else dtensor.shard_like(x, p, torch.bool) for x, p in pairs])
            self.age = count_of(found, AGE)
        elif "mask" in found and self.scored:
            # It was saved before a mask was chosen.
            self._hold(None)
            self.age = 0
        return "reference" in found

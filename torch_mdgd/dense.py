"""φ and the mask at full size: what any optimizer, elementwise or not, can be wrapped with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_mdgd import checkpoint, sharded
from torch_mdgd.decoupling import Decouple
from torch_mdgd.kernels import Role
from torch_mdgd.masking import restore_outside_
from torch_mdgd.reference import exchange_, snapshot


class DenseStorage:
    """A copy of every trainable number and, under a mask, one bool for each.

    Args:
        parameters: in parameter order.
        chooses: whether a mask is chosen at some time.
    """

    def __init__(self, parameters: Sequence[Tensor], chooses: bool = False) -> None:
        self.reference = snapshot(parameters)
        self.chooses = chooses
        self._hold(None)

    def _hold(self, masks: Sequence[Tensor] | None) -> None:
        self.masks = None if masks is None else list(masks)
        # Now, when all ranks are here: diagnostics may be asked for on one.
        self._kept = sharded.count(self.masks or [])

    def __len__(self) -> int:
        return len(self.reference)

    @property
    def masked(self) -> bool:
        """Whether a mask has been chosen."""
        return self.masks is not None

    def kept(self, parameters: Sequence[Tensor]) -> tuple[int, int]:
        """How many numbers may move, of how many."""
        return self._kept, sum(p.numel() for p in parameters)

    def extend(self, parameters: Sequence[Tensor]) -> None:
        """Take in new parameters, at their values now."""
        self.reference += snapshot(parameters)

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Hold all where the parameters are: moved or sharded after they were wrapped, as by accelerate."""
        if not all(map(sharded.same_place, self.reference, parameters)):
            self.reference = list(map(sharded.shard_like, self.reference, parameters))
            if self.masks is not None:
                self.masks = list(map(sharded.shard_like, self.masks, parameters))

    def exchange_(self, parameters: Sequence[Tensor]) -> None:
        """Swap θ and φ."""
        self.follow(parameters)
        exchange_(parameters, self.reference)

    def choose(self, masks: Sequence[Tensor], base: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Hold everything outside these masks still from now on; a number that comes in anew begins with no state."""
        for p, old, new in zip(parameters, self.masks or (), masks, strict=False):
            for value in base.state.get(p, {}).values():
                if isinstance(value, Tensor) and value.shape == p.shape and value.dim():
                    value.mul_(old & new)
        self._hold(masks)

    def restrict_(self, v: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The directions v inside the mask, in place."""
        for x, mask in zip(v, self.masks or (), strict=False):
            if x is not None:
                x.mul_(mask)
        return list(v)

    def combine_(self, d: Role, roles: Sequence[Role], coefficients: Tensor) -> None:
        """Write the linear combination of the roles, under the mask, over d."""
        sharded.combine_(d, roles, coefficients, self.masks)

    def step(self, base: Optimizer, parameters: Sequence[Tensor], decouple_: Decouple | None) -> None:
        """One step of the wrapped optimizer, and what is to be done to its moves."""
        if self.masks is None and decouple_ is None:
            base.step()
            return
        self.follow(parameters)
        before = snapshot(parameters)
        base.step()
        if self.masks is not None:
            restore_outside_(parameters, before, self.masks)
        if decouple_ is not None:
            decouple_(parameters, before)

    def save(self, base: Optimizer) -> dict[str, Any]:
        """The wrapped optimizer's state dict with φ and the mask in it."""
        self.follow([p for group in base.param_groups for p in group["params"]])
        masks = self.masks
        if masks is None and self.chooses:
            # A place for it: torch.distributed.checkpoint loads what a fresh optimizer has, and nothing else.
            masks = [torch.zeros_like(x, dtype=torch.bool) for x in self.reference]
        return checkpoint.pack(base.state_dict(), {"reference": self.reference, "mask": masks})

    def load(self, state_dict: dict[str, Any], base: Optimizer, parameters: Sequence[Tensor]) -> bool:
        """The opposite of :meth:`save`; returns whether φ was there. See ``MDGDOptimizer.load_state_dict``."""
        inner, found = checkpoint.unpack(state_dict, parameters)
        if "positions" in found:
            raise ValueError("the state dict was saved with compact=True: build the MDGDOptimizer so, too")
        for name in ("reference", "mask"):
            if name in found:
                checkpoint.require_shapes(name, found[name], [p.shape for p in parameters])
        if not self.chooses and sharded.count(found.get("mask", [])):
            raise ValueError("the state dict was saved with a mask: build the MDGDOptimizer with it, too")
        base.load_state_dict(inner)
        if "reference" in found:
            pairs = zip(found["reference"], parameters, strict=True)
            self.reference = [sharded.shard_like(x, p, p.dtype) for x, p in pairs]
        pairs = zip(found.get("mask", ()), parameters, strict=False)
        self._hold([sharded.shard_like(x, p, torch.bool) for x, p in pairs])
        if not self._kept:
            self._hold(None)
        return "reference" in found

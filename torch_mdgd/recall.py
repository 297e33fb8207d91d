"""Gradients at the reference for several steps: g~0 (7) is kept and used again, instead of being taken anew.

φ never moves, so what g~0 misses in the steps between is their data: r (8) is then what g~ shares with the direction
that an earlier batch had at φ. It is ours, not the paper's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_mdgd import checkpoint, settings, sharded
from torch_mdgd.kernels import Role
from torch_mdgd.settings import Group

AGE = "reference_age"
NAME = "recalled"


class Recall:
    """g~0 of an earlier step, one gradient-sized buffer, and how many steps have used it.

    It is kept when the optimizer has stepped, and so never from a step that a gradient scaler skipped. Its length is of
    no account, since r does not depend on it: neither is the loss scale of the step that it came from.

    The count lies in the first parameter group and g~0 in each parameter's state, so that both survive checkpoints.

    Args:
        every: steps that share one g~0.
        groups: the parameter groups.
        masked: whether a mask is chosen at some time.

    Raises:
        ValueError: ``every`` is no whole number from 1, or more than 1 where no step takes gradients at φ.
    """

    def __init__(self, every: int, groups: Sequence[Group], masked: bool) -> None:
        settings.require_whole("reference_every", every)
        if every > 1 and not settings.needs_reference(groups, masked):
            raise ValueError(
                "reference_every shares gradients at the reference, which this update does not take: it is for "
                "update='reference' and, without a mask, update='regularize' with a regularize above 0"
            )
        self.every = every
        self.held: list[Tensor | None] | None = None
        self.used: list[Tensor | None] | None = None
        if every > 1:
            # From the start: torch.distributed.checkpoint loads what a fresh optimizer has, and nothing else.
            groups[0].setdefault(AGE, 0)

    def use(self, g0_tilde: Sequence[Tensor | None] | None) -> None:
        """Note the g~0 of the combine that is under way, None without one; it counts once the step is made."""
        self.used = None if g0_tilde is None or self.every == 1 else list(g0_tilde)

    def keep(self, groups: Sequence[Group]) -> None:
        """The step was made: keep what it used, or let go of it after the last step that may use it."""
        if self.used is None:
            return
        again = self.held is not None and all(x is y for x, y in zip(self.used, self.held, strict=True))
        age = (int(groups[0].get(AGE, 0)) if again else 0) + 1
        groups[0][AGE] = age % self.every
        self.held = self.used if age < self.every else None

    def save(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """The state dict with g~0 in it, zeros if none is kept now."""
        if self.every == 1:
            return state_dict
        held: Role = self.held or [None] * len(parameters)
        tensors = [torch.zeros_like(p) if x is None else x for p, x in zip(parameters, held, strict=True)]
        return checkpoint.pack(state_dict, {NAME: [x.detach() for x in tensors]})

    def load(self, state_dict: dict[str, Any], parameters: Sequence[Tensor], groups: Sequence[Group]) -> None:
        """The opposite of :meth:`save`; without a g~0 in it, the next step takes one."""
        self.held = None
        found = checkpoint.unpack(state_dict, parameters)[1].get(NAME)
        if self.every == 1:
            groups[0].pop(AGE, None)
        elif found is None or not groups[0].get(AGE):
            groups[0][AGE] = 0
        else:
            checkpoint.require_shapes(NAME, found, [p.shape for p in parameters])
            copies = [sharded.shard_like(x, p) for x, p in zip(found, parameters, strict=True)]
            # A parameter that had no gradient at φ has none again.
            self.held = [x if sharded.count([x != 0]) else None for x in copies]

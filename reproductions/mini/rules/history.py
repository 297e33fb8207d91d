"""The visual drift as what step space takes out of moves: the directions are the visual gradients of the steps."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch_mdgd.decoupling import Decouple, decouple_moves_, removal
from torch_mdgd.equations import pool, ratio
from torch_mdgd.history import Memory
from torch_mdgd.settings import Group

from torch_mdgd import checkpoint, history, settings, sharded
from torch_mdgd.kernels import Role, inner_products

AGE = "history_age"
LEFT, RIGHT = "history_left", "history_right"


class VisualDrift:
    """Removes from each move what raises the visual loss where it began, or all components along the last k directions.

    The visual gradient of the step under way is used as it is; the k − 1 before it are those of :mod:`history`. A step
    is remembered once it is made, and so never one that a gradient scaler skipped; a parameter whose visual gradient is
    zero, NaN or Inf remembers nothing of that step.

    How many steps were remembered lies in the first parameter group, and the directions in each parameter's state, so
    that both survive checkpoints.

    Args:
        groups: the parameter groups.
        masked: whether a mask is chosen at some time.
        compact: whether moves are those of the selected numbers alone.

    Raises:
        ValueError: ``history`` differs within scope "global"; or history > 1, compact and sharded parameters.
    """

    def __init__(self, groups: Sequence[Group], masked: bool, compact: bool) -> None:
        self.masked, self.compact = masked, compact
        self.memories: list[Memory | None] = []
        self._fit(groups)

    def check_groups(self, groups: Sequence[Group]) -> None:
        """See :class:`torch_mdgd.decoupling.Decoupling`, here and below."""
        lengths = {group["history"] for group in groups if group["space"] == "step" and group["scope"] == "global"}
        if len(lengths) > 1:
            raise ValueError(f"history must be the same in all groups of scope 'global', got {sorted(lengths)}")

    def _fit(self, groups: Sequence[Group]) -> None:
        self.check_groups(groups)
        rows = [(p, group["history"]) for group in groups for p in group["params"]]
        held = self.memories + [None] * (len(rows) - len(self.memories))
        self.memories = [self._fitting(p, k, memory) for (p, k), memory in zip(rows, held, strict=True)]
        if any(memory is not None for memory in self.memories):
            # From the start: torch.distributed.checkpoint loads what a fresh optimizer has, and nothing else.
            groups[0].setdefault(AGE, 0)

    def of_step(self, directions: Role | None, groups: Sequence[Group]) -> Decouple | None:
        """See above."""
        if directions is None:
            return None
        # Parameters may have been sharded, or a group's settings changed, since the last step.
        self._fit(groups)
        return partial(self._decouple_, v=directions, groups=groups)

    def extend(self, group: Group) -> None:
        """See above."""
        self.memories += [self._fitting(p, group["history"], None) for p in group["params"]]

    def begin(self) -> None:
        """See above."""
        for t, memory in enumerate(self.memories):
            if memory is not None and self.compact:
                self.memories[t] = self._empty(memory.left, len(memory.left))
            elif memory is not None:
                memory.clear()

    def _empty(self, like: Tensor, directions: int) -> Memory:
        """That of a compact parameter until it is known how many numbers move, at the next step."""
        return history.remember(like.detach().new_empty(0), directions, self.masked)

    def _fitting(self, p: Tensor, k: int, memory: Memory | None) -> Memory | None:
        """The memory for this parameter: the one it has, if that is still of its history and sharded as it is."""
        if k == 1:
            return None
        if self.compact:
            sharded.refuse_sharded("history > 1 with compact=True", [p], "use history=1 or compact=False")
        if memory is None or len(memory.left) != k - 1:
            return self._empty(p, k - 1) if self.compact else history.remember(p, k - 1, self.masked)
        if sharded.is_sharded(p) != sharded.is_sharded(memory.left):
            return history.place(p, memory.left, memory.right, self.masked)
        return memory

    def _decouple_(
        self, parameters: Sequence[Tensor], before: Sequence[Tensor], v: Role, groups: Sequence[Group]
    ) -> None:
        together, restore = settings.together(groups, "step"), settings.restores(groups)
        short = [t for t, memory in enumerate(self.memories) if memory is None]
        if short:
            p, x = ([xs[t] for t in short] for xs in (parameters, before))
            decouple_moves_(p, x, [v[t] for t in short], [together[t] for t in short], restore[short])
        long = [t for t, memory in enumerate(self.memories) if memory is not None]
        if long:
            p, x = ([xs[t] for t in long] for xs in (parameters, before))
            self._remove_(p, x, [v[t] for t in long], [together[t] for t in long], restore[long], long, groups[0])

    def _remove_(
        self,
        parameters: Sequence[Tensor],
        before: Sequence[Tensor],
        v: Role,
        together: Sequence[bool],
        restore: Tensor,
        ts: Sequence[int],
        first: Group,
    ) -> None:
        """:func:`decouple_moves_` for parameters with a history, at positions ``ts``."""
        moves, ps = sharded.local(before), sharded.local(parameters)
        for p, x in zip(ps, moves, strict=True):
            torch.sub(p, x, out=x)
        vs = [torch.zeros_like(x) if y is None else y for x, y in zip(moves, sharded.local(v), strict=True)]
        memories = [self._sized(t, p) for t, p in zip(ts, ps, strict=True)]
        table = pool(sharded.sum_shards_(_products(memories, vs, moves), parameters), torch.tensor(together))
        dd, vv = table[:, -1, -1], table[:, -2, -2]
        c = removal(table)
        c[:, -1] += restore.to(c.device) * ratio(dd.sqrt(), vv.sqrt())
        for p, x, memory, row in zip(ps, vs, memories, c, strict=True):
            memory.remove_(p, row[: len(memory.left)], x, row[-1])
        if any(x is not None for x in v):
            age = int(first.get(AGE, 0))
            self._remember_(memories, vs, vv.sqrt(), age, parameters)
            first[AGE] = age + 1

    def _sized(self, t: int, p: Tensor) -> Memory:
        """The memory of parameter t, for as many numbers as there are now."""
        memory = self.memories[t]
        assert memory is not None
        if self.compact and memory.left.shape[1:] != p.shape:
            memory = self.memories[t] = history.remember(p.detach(), len(memory.left), self.masked)
        return memory

    def _remember_(
        self, memories: Sequence[Memory], v: Sequence[Tensor], size: Tensor, age: int, like: Sequence[Tensor]
    ) -> None:
        """Put v / size in the place of the oldest direction."""
        found = [m.iterate(x, (age - 1) % len(m.left), s) for m, x, s in zip(memories, v, size, strict=True)]
        parts = [part for _, part in found]
        if any(map(sharded.is_sharded, like)):
            summed = sharded.sum_shards_(pad_sequence([x.double() for x in parts], batch_first=True), like)
            parts = [row[: len(x)].to(x.dtype) for row, x in zip(summed, parts, strict=True)]
        good = size.isfinite() & (size > 0)
        for memory, (u, _), part, s, ok in zip(memories, found, parts, size, good, strict=True):
            memory.store(age % len(memory.left), u, part, s, ok)

    def save(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """See above."""
        if not any(memory is not None for memory in self.memories):
            return state_dict
        nothing = torch.zeros(0, dtype=history.STORED)
        left = [nothing if memory is None else memory.left for memory in self.memories]
        right = [nothing if memory is None else memory.right for memory in self.memories]
        return checkpoint.pack(state_dict, {LEFT: left, RIGHT: right})

    def check(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """See above."""
        found = checkpoint.unpack(state_dict, parameters)[1]
        if LEFT not in found:
            return
        lengths = [group["history"] - 1 for group in settings.per_parameter(state_dict["param_groups"])]
        like = parameters
        if self.compact:
            pairs = zip(found.get("positions", parameters), found[LEFT], strict=True)
            like = [x if left.numel() else x[:0] for x, left in pairs]
        wanted = [history.shapes(p, k, self.masked) if k else ((0,), (0,)) for p, k in zip(like, lengths, strict=True)]
        for name, shapes in zip((LEFT, RIGHT), zip(*wanted, strict=True), strict=True):
            checkpoint.require_shapes(name, found[name], shapes)

    def load(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """See above."""
        found = checkpoint.unpack(state_dict, parameters)[1]
        lengths = [group["history"] for group in settings.per_parameter(state_dict["param_groups"])]
        self.memories = [self._fitting(p, k, None) for p, k in zip(parameters, lengths, strict=True)]
        for t, memory in enumerate(self.memories if LEFT in found else ()):
            if memory is not None:
                self.memories[t] = history.place(parameters[t], found[LEFT][t], found[RIGHT][t], self.masked)


def _products(memories: Sequence[Memory], v: Sequence[Tensor], moves: Sequence[Tensor]) -> Tensor:
    """Inner products of the remembered directions, v and the move, shape (T, k + 2, k + 2); zeros where fewer are."""
    most = max(len(memory.left) for memory in memories)
    table = torch.zeros(len(v), most + 2, most + 2, dtype=torch.float64, device=v[0].device)
    table[:, most:, most:] = inner_products([v, moves])
    for rows, memory, x, move in zip(table, memories, v, moves, strict=True):
        k = len(memory.left)
        found = memory.products([x, move])
        rows[:k, :k] = found[:, :k]
        rows[:k, most:] = found[:, k:]
        rows[most:, :k] = found[:, k:].T
    return table

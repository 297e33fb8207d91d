"""Step space with a history: moves lose their components along the visual gradients of the last k steps.

As :class:`torch_mdgd.StepProject`, it corrects the move Δ that the wrapped optimizer made with g, but by both signs and
by more than the present direction. With Q an orthonormal basis of the last k visual gradients, v among them,

    Δ'  = Δ − Q Qᵀ Δ
    Δ'' = Δ' − a ‖Δ‖ v / ‖v‖                       a restoring move

The restoring move follows the projection, and no later one sees it: what they project is the wrapped optimizer's.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reproductions.mini.rules.memory import STORED, Memory, remember
from torch_mdgd.checks import require_whole
from torch_mdgd.kernels import Tensors, inner_products, ratio
from torch_mdgd.rules.base import Rule, Weights, checked, lone, require_shapes, task_alone
from torch_mdgd.rules.step import moves_

AGE, LEFT, RIGHT = "history_age", "history_left", "history_right"
# A direction of length 1 of which no more than this is not in the span of others.
DEPENDENT = 1e-4
# Of a Gram matrix with diagonal 1, against dependent directions; and how often its error is corrected.
RIDGE = 1e-9
ROUNDS = 4


class History(Rule):
    """Removes from each move its components along the visual gradient where it began and the k − 1 before it.

    The visual gradient of the step under way is used as it is; the earlier ones are those of a
    :class:`~reproductions.mini.rules.memory.Memory`. A step is remembered once it is made, and so never one that a
    gradient scaler skipped; a parameter whose visual gradient is zero, NaN or Inf remembers nothing of that step.

    It works on whole parameters of one process, and under masks that are chosen once.

    Args:
        k: how many visual gradients, from 2.
        restore: a ≥ 0, the length of the restoring move relative to the move's.

    Raises:
        ValueError: an argument is out of range, naming it.
    """

    corrects = True

    def __init__(self, k: int, restore: float = 0.0) -> None:
        if require_whole("History: k", k) < 2:
            raise ValueError("History: k must be 2 or more; with the present direction alone it is StepProject")
        self.k, self.weights = k, checked(History, restore=restore)
        self.masked, self.age = False, 0
        self.memories: list[Memory] = []

    def attach(self, parameters: Sequence[Tensor], masked: bool) -> None:
        """Begin with k − 1 directions of zeros for each parameter.

        Raises:
            ValueError: it belongs to another optimizer already.
        """
        if self.memories:
            raise ValueError("History belongs to another optimizer already: make a new one")
        self.masked = masked
        self.extend(parameters)

    def extend(self, parameters: Sequence[Tensor]) -> None:
        """The same for more parameters."""
        self.memories += [remember(p, self.k - 1, self.masked) for p in parameters]

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """D = g."""
        return task_alone(products)

    def correct_(self, parameters: Tensors, before: Tensors, visual: Tensors | None, w: Weights) -> None:
        """Δ → Δ'', and remember v.

        Raises:
            ValueError: the storage is compact.
        """
        rows = zip(
            parameters,
            moves_(parameters, before),
            [None] * len(parameters) if visual is None else visual,
            self.memories,
            strict=True,
        )
        live = [(p, x, v, m) for p, x, v, m in rows if p is not None and x is not None]
        if not live:
            return
        ps, moves, found, memories = zip(*live, strict=True)
        if any(p.shape != m.shape for p, m in zip(ps, memories, strict=True)):
            raise ValueError("History needs all numbers of the parameters: pass compact=False")
        vs = [torch.zeros_like(x) if v is None else v for x, v in zip(moves, found, strict=True)]
        table = _products(memories, vs, moves)
        dd, vv = table[:, -1, -1], table[:, -2, -2]
        c = removal(table)
        restore = w["restore"][[p is not None for p in parameters]].to(c.device)
        c[:, -1] += restore * ratio(dd.sqrt(), vv.sqrt())
        for p, memory, v, row in zip(ps, memories, vs, c, strict=True):
            memory.subtract_(p, row[:-1], v, row[-1])
        if any(v is not None for v in found):
            size, slot = vv.sqrt(), self.age % (self.k - 1)
            good = size.isfinite() & (size > 0)
            for memory, v, s, ok in zip(memories, vs, size, good, strict=True):
                memory.store_(slot, v, s, ok)
            self.age += 1

    def state(self) -> dict[str, Tensor | Sequence[Tensor]]:
        """The directions, and how many steps were remembered."""
        left, right = ([getattr(m, side) for m in self.memories] for side in ("left", "right"))
        return {LEFT: left, RIGHT: right, AGE: torch.tensor(self.age)}

    def check_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """Raise a ValueError if the history there is of other parameters or of another length."""
        for name, held in self.state().items():
            if name in found and not isinstance(held, Tensor):
                require_shapes(name, found[name], [x.shape for x in held])

    def load_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """The opposite of :meth:`state`."""
        age = lone(found, AGE)
        self.age, self.memories = 0 if age is None else int(age), []
        self.extend(parameters)
        for t, memory in enumerate(self.memories):
            for side, name in (("left", LEFT), ("right", RIGHT)):
                x = found[name][t] if name in found else None
                if x is not None:
                    setattr(memory, side, x.to(getattr(memory, side).device, STORED, copy=True))


def removal(table: Tensor) -> Tensor:
    """The projection of moves on spans, as coefficients: Σ_j c_j D_j + c_v v.

    v is taken last, for its products with the others are not exact: what is left of it beside them may be rounding.

    Args:
        table: inner products of D_1, ..., D_k, v and the move, shape (T, k + 2, k + 2), float64. The D_j may be zero or
            dependent; NaN and Inf of v and the move come through.

    Returns:
        shape (T, k + 1).
    """
    k = table.shape[-1] - 2
    lengths = table.diagonal(dim1=1, dim2=2)[:, :k].sqrt()
    scale = ratio(torch.ones_like(lengths), lengths)[..., None]
    gram, right = scale * table[:, :k, :k] * scale.mT, scale * table[:, :k, k:]
    # Not the eigenvalues, for which the host would wait. Each round takes a ridge's error to a higher power.
    lower, _ = torch.linalg.cholesky_ex(gram + RIDGE * torch.eye(k, dtype=gram.dtype, device=gram.device))
    x: Tensor = torch.zeros_like(right)
    for _ in range(ROUNDS):
        x = x + torch.cholesky_solve(right - gram @ x, lower)
    of_v, of_move = x.unbind(-1)
    vv = table[:, k, k] - (of_v * right[..., 0]).sum(1)
    vd = table[:, k, k + 1] - (of_v * right[..., 1]).sum(1)
    c_v = torch.where(vv <= DEPENDENT**2 * table[:, k, k], torch.zeros_like(vd), vd / vv)
    return torch.cat([scale[..., 0] * (of_move - c_v[:, None] * of_v), c_v[:, None]], 1)


def _products(memories: Sequence[Memory], v: Sequence[Tensor], moves: Sequence[Tensor]) -> Tensor:
    """Inner products of the remembered directions, v and the move, shape (T, k + 1, k + 1)."""
    table = inner_products([v, moves])
    rows = [memory.products(pair) for memory, *pair in zip(memories, v, moves, strict=True)]
    found = torch.stack(rows).to(table.device)
    k = found.shape[1]
    return torch.cat([found, torch.cat([found[..., k:].mT, table], 2)], 1)

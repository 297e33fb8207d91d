"""Earlier visual gradients of one parameter, compressed: k directions D_j in far less room than k gradients.

The visual gradient of a weight matrix is a sum over image tokens, and one term u wᵀ holds more than half of its energy.
So a matrix (m, n) keeps m + n numbers a direction, from one step of power iteration that goes on from the last one (as
PowerSGD compresses gradients: Vogels et al., NeurIPS 2019). What is not a matrix, or is masked, keeps all its numbers.
Both are bfloat16: what is removed from a move is removed exactly along what is stored.

A memory works on this rank's part of a parameter. What it returns to be summed over parts is summed outside.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_mdgd import sharded

STORED = torch.bfloat16
# How many numbers of every direction are in float64 at a time.
BLOCK = 1 << 16
# How much of the power iteration's start is not the last direction, which alone could be orthogonal to all that comes.
FRESH = 0.1


class Memory(ABC):
    """Directions D_j of one parameter, bfloat16.

    Args:
        left: shape (k, ...), sharded as the parameter is behind its first dimension.
        right: whole on every rank.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right

    @abstractmethod
    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """⟨D_i, D_j⟩ and, behind them, ⟨D_i, x⟩ for each x: float64, shape (k, k + len(vectors)), to be summed."""

    @abstractmethod
    def combination(self, coefficients: Tensor, x: Tensor, c: Tensor) -> Tensor:
        """Σ_j coefficients_j D_j + c x, in at least float32."""

    def remove_(self, parameter: Tensor, coefficients: Tensor, x: Tensor, c: Tensor) -> None:
        """Subtract :meth:`combination`, rounded once."""
        parameter.sub_(self.combination(coefficients, x, c))

    @abstractmethod
    def iterate(self, v: Tensor, last: int, size: Tensor) -> tuple[Tensor, Tensor]:
        """What is to be stored of v / size, going on from direction ``last``; and more of it, to be summed."""

    @abstractmethod
    def store(self, slot: int, u: Tensor, summed: Tensor, size: Tensor, good: Tensor) -> None:
        """Make this direction ``slot``, where good."""

    def clear(self) -> None:
        """Forget all directions."""
        for x in sharded.local([self.left, self.right]):
            x.zero_()


class Factors(Memory):
    """D_j = u_j w_jᵀ of a parameter seen as a matrix (m, n), its first dimension against all others.

    ``left`` holds u_j, shape (k, m), and ``right`` w_j, shape (k, n).
    """

    def _read(self, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _precision(like)
        return sharded.local([self.left])[0].to(dtype), self.right.to(dtype)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """(U Uᵀ) ⊙ (W Wᵀ), and the diagonals of U X Wᵀ."""
        left, right = self._read(vectors[0])
        own = (left.double() @ left.double().T) * (right.double() @ right.double().T)
        others = [(left * (right @ _matrix(x).to(left.dtype).T)).sum(1, dtype=torch.float64) for x in vectors]
        return torch.cat([own, torch.stack(others, 1)], 1)

    def combination(self, coefficients: Tensor, x: Tensor, c: Tensor) -> Tensor:
        """See :class:`Memory`, here and below."""
        left, right = self._read(x)
        scaled = left * coefficients.to(left.dtype)[:, None]
        return torch.addmm(_matrix(x).to(left.dtype) * c.to(left.dtype), scaled.T, right).view(x.shape)

    def remove_(self, parameter: Tensor, coefficients: Tensor, x: Tensor, c: Tensor) -> None:
        """See above; without a temporary of the parameter's size where one more rounding is of no account."""
        left, right = self._read(x)
        if parameter.dtype != left.dtype or not parameter.is_contiguous() or not parameter.numel():
            super().remove_(parameter, coefficients, x, c)
            return
        parameter.addcmul_(x, -c.to(left.dtype))
        scaled = left * coefficients.to(left.dtype)[:, None]
        parameter.view(_matrix(parameter).shape).addmm_(scaled.T, right, alpha=-1)

    def iterate(self, v: Tensor, last: int, size: Tensor) -> tuple[Tensor, Tensor]:
        """First u = v w / size, from the last w; then vᵀ u, with ‖u‖² behind it."""
        v = _matrix(v).to(_precision(v))
        w = self.right[last].to(v.dtype)
        start = w / w.norm().clamp(min=torch.finfo(torch.float32).tiny) + FRESH * _chirp(v)
        u = v @ (start / size.to(v.dtype))
        return u, torch.cat([u @ v, (u @ u)[None]])

    def store(self, slot: int, u: Tensor, summed: Tensor, size: Tensor, good: Tensor) -> None:
        """D_slot = u uᵀ v / (‖u‖² size), where good."""
        length = summed[-1].sqrt()
        for held, new, divisor in ((self.left, u, length), (self.right, summed[:-1], length * size.to(u.dtype))):
            part = sharded.local([held])[0][slot]
            part.copy_(torch.where(good, torch.where(length == 0, 0, new / divisor).to(STORED), part))


class Rows(Memory):
    """D_j in full: ``left`` has shape (k, *that of the parameter), and ``right`` (0,)."""

    def _read(self) -> Tensor:
        rows: Tensor = sharded.local([self.left])[0]
        return rows.reshape(len(rows), rows[0].numel())

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """See :class:`Memory`, here and below."""
        rows = self._read()
        k = len(rows)
        out = torch.zeros(k, k + len(vectors), dtype=torch.float64, device=rows.device)
        flat = [x.reshape(-1) for x in vectors]
        for start in range(0, rows.shape[1], BLOCK):
            where = slice(start, start + BLOCK)
            block = torch.cat([rows[:, where].double(), *(x[None, where].double() for x in flat)])
            out += block[:k] @ block.T
        return out

    def combination(self, coefficients: Tensor, x: Tensor, c: Tensor) -> Tensor:
        """See above."""
        rows, dtype = self._read(), _precision(x)
        out = x.reshape(-1).to(dtype) * c.to(dtype)
        for start in range(0, len(out), BLOCK):
            where = slice(start, start + BLOCK)
            out[where] += coefficients.to(dtype) @ rows[:, where].to(dtype)
        return out.view(x.shape)

    def iterate(self, v: Tensor, last: int, size: Tensor) -> tuple[Tensor, Tensor]:
        """V itself: there is nothing to find."""
        return v, torch.zeros(0, dtype=_precision(v), device=v.device)

    def store(self, slot: int, u: Tensor, summed: Tensor, size: Tensor, good: Tensor) -> None:
        """D_slot = u / size, where good."""
        part = sharded.local([self.left])[0][slot]
        part.copy_(torch.where(good, (u / size.to(_precision(u))).to(STORED), part))


def shapes(parameter: Tensor, directions: int, masked: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of left and right."""
    if _factored(parameter, masked):
        m = parameter.shape[0]
        return (directions, m), (directions, parameter.numel() // m)
    return (directions, *parameter.shape), (0,)


def remember(parameter: Tensor, directions: int, masked: bool) -> Memory:
    """A memory of so many directions, all zero."""
    left, right = shapes(parameter, directions, masked)
    kind = Factors if _factored(parameter, masked) else Rows
    if sharded.is_sharded(parameter):
        from torch.distributed.tensor import zeros

        tensor: Any = parameter
        first: Tensor = zeros(*left, dtype=STORED, device_mesh=tensor.device_mesh, placements=_placements(parameter))
    else:
        first = torch.zeros(left, dtype=STORED, device=parameter.device)
    return kind(first, torch.zeros(right, dtype=STORED, device=parameter.device))


def place(parameter: Tensor, left: Tensor, right: Tensor, masked: bool) -> Memory:
    """A memory of copies of these tensors, whole or sharded, that is sharded as the parameter is."""
    kind = Factors if _factored(parameter, masked) else Rows
    part = sharded.local([parameter])[0]
    source: Any = left
    if sharded.is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, _placements(parameter)  # type: ignore[attr-defined]
        if sharded.is_sharded(left):
            first = source.redistribute(mesh, placements).to(part.device, STORED, copy=True)
        else:
            first = distribute_tensor(source.to(part.device, STORED), mesh, placements, src_data_rank=None)
    else:
        first = sharded.shard_like(left, part, STORED)
    return kind(first, sharded.shard_like(right, part, STORED))


def _factored(parameter: Tensor, masked: bool) -> bool:
    """Under a mask factors would be of numbers outside; of columns on several ranks nothing is known here."""
    if masked or parameter.dim() < 2 or not parameter.numel():
        return False
    rows: bool = all(x.is_replicate() or x.dim == 0 for x in getattr(parameter, "placements", ()))
    return rows and parameter.shape[0] + parameter.numel() // parameter.shape[0] < parameter.numel()


def _placements(parameter: Any) -> list[Any]:
    """Those of the parameter, for a tensor with one more dimension before its own.

    Raises:
        ValueError: a kind of placement that ``fully_shard`` alone does not make.
    """
    from torch.distributed.tensor import Shard

    out = []
    for x in parameter.placements:
        if not x.is_replicate() and type(x) is not Shard:
            raise ValueError(f"history > 1: parameters are sharded as {x}, which is not supported: use history=1")
        out.append(x if x.is_replicate() else Shard(x.dim + 1))
    return out


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x[:1].numel() if x.shape[0] else x.shape[1:].numel())


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chirp(like: Tensor) -> Tensor:
    """A vector of length 1 that is like no other: the same in every process and run."""
    n = like.shape[1]
    wave: Tensor = torch.arange(n, device=like.device, dtype=torch.float64).square().cos() * (2 / n) ** 0.5
    return wave.to(like.dtype)

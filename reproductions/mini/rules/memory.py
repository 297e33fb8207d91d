"""Earlier visual gradients of one parameter, compressed: k directions D_j in far less room than k gradients.

The visual gradient of a weight matrix is a sum over image tokens, and one term u wᵀ holds more than half of its energy.
So a matrix (m, n) keeps m + n numbers a direction, from one step of power iteration that goes on from the last one (as
PowerSGD compresses gradients: Vogels et al., NeurIPS 2019). What is not a matrix, or is masked, keeps all its numbers.
Both are bfloat16: what is removed from a move is removed exactly along what is stored.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

STORED = torch.bfloat16
# How many numbers of every direction are in float64 at a time.
BLOCK = 1 << 16
# How much of the power iteration's start is not the last direction, which alone could be orthogonal to all that comes.
FRESH = 0.1


class Memory(ABC):
    """Directions D_j of one parameter, bfloat16.

    Args:
        shape: of the parameter.
        left: shape (k, ...).
        right: its other factors, if it has some.
    """

    def __init__(self, shape: torch.Size, left: Tensor, right: Tensor) -> None:
        self.shape, self.left, self.right = shape, left, right

    @abstractmethod
    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """⟨D_i, D_j⟩ and, behind them, ⟨D_i, x⟩ for each x: float64, shape (k, k + len(vectors))."""

    @abstractmethod
    def subtract_(self, parameter: Tensor, coefficients: Tensor, x: Tensor, c: Tensor) -> None:
        """θ − Σ_j coefficients_j D_j − c x, in place."""

    @abstractmethod
    def store_(self, slot: int, v: Tensor, size: Tensor, good: Tensor) -> None:
        """Make what is stored of v / size direction ``slot``, where good; the one before it is the last one."""


class Factors(Memory):
    """D_j = u_j w_jᵀ of a parameter seen as a matrix (m, n), its first dimension against all others.

    ``left`` holds u_j, shape (k, m), and ``right`` w_j, shape (k, n).
    """

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """(U Uᵀ) ⊙ (W Wᵀ), and the diagonals of U X Wᵀ."""
        dtype = _precision(vectors[0])
        left, right = self.left.to(dtype), self.right.to(dtype)
        own = (left.double() @ left.double().T) * (right.double() @ right.double().T)
        others = [(left * (right @ _matrix(x).to(dtype).T)).sum(1, dtype=torch.float64) for x in vectors]
        return torch.cat([own, torch.stack(others, 1)], 1)

    def subtract_(self, parameter: Tensor, coefficients: Tensor, x: Tensor, c: Tensor) -> None:
        """See :class:`Memory`, here and below; without a temporary where one more rounding is of no account."""
        dtype = _precision(x)
        scaled, right = (self.left.to(dtype) * coefficients.to(dtype)[:, None]).T, self.right.to(dtype)
        if parameter.dtype == dtype and parameter.is_contiguous():
            parameter.addcmul_(x, -c.to(dtype))
            parameter.view(_matrix(parameter).shape).addmm_(scaled, right, alpha=-1)
        else:
            parameter.sub_(torch.addmm(_matrix(x).to(dtype) * c.to(dtype), scaled, right).view(x.shape))

    def store_(self, slot: int, v: Tensor, size: Tensor, good: Tensor) -> None:
        """u = v w / size from the last w, and D = u uᵀ v / (‖u‖² size)."""
        v = _matrix(v).to(_precision(v))
        w, size = self.right[slot - 1].to(v.dtype), size.to(v.dtype)
        start = w / w.norm().clamp(min=torch.finfo(torch.float32).tiny) + FRESH * _chirp(v)
        u = v @ (start / size)
        length = (u @ u).sqrt()
        for held, new, divisor in ((self.left, u, length), (self.right, u @ v, length * size)):
            held[slot] = torch.where(good, torch.where(length == 0, 0, new / divisor).to(STORED), held[slot])


class Rows(Memory):
    """D_j in full: ``left`` has shape (k, *that of the parameter), and ``right`` (0,)."""

    def _rows(self) -> Tensor:
        return self.left.view(len(self.left), self.left[0].numel())

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """See :class:`Memory`, here and below."""
        k, rows = len(self.left), self._rows()
        flat = [x.reshape(-1) for x in vectors]
        out = torch.zeros(k, k + len(vectors), dtype=torch.float64, device=rows.device)
        for start in range(0, rows.shape[1], BLOCK):
            where = slice(start, start + BLOCK)
            block = torch.cat([rows[:, where].double(), *(x[None, where].double() for x in flat)])
            out += block[:k] @ block.T
        return out

    def subtract_(self, parameter: Tensor, coefficients: Tensor, x: Tensor, c: Tensor) -> None:
        """See above."""
        rows, dtype = self._rows(), _precision(x)
        out = x.reshape(-1).to(dtype) * c.to(dtype)
        for start in range(0, len(out), BLOCK):
            where = slice(start, start + BLOCK)
            out[where] += coefficients.to(dtype) @ rows[:, where].to(dtype)
        parameter.sub_(out.view(x.shape))

    def store_(self, slot: int, v: Tensor, size: Tensor, good: Tensor) -> None:
        """V / size."""
        self.left[slot] = torch.where(good, (v / size.to(_precision(v))).to(STORED), self.left[slot])


def remember(parameter: Tensor, directions: int, masked: bool) -> Memory:
    """A memory of so many directions, all zero. Under a mask factors would be of numbers outside."""
    m, n = _matrix(parameter).shape if parameter.dim() > 1 and parameter.numel() else (0, 0)
    factored = not masked and m + n < m * n
    left, right = ((directions, m), (directions, n)) if factored else ((directions, *parameter.shape), (0,))
    made = (torch.zeros(shape, dtype=STORED, device=parameter.device) for shape in (left, right))
    return (Factors if factored else Rows)(parameter.shape, *made)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chirp(like: Tensor) -> Tensor:
    """A vector of length 1 that is like no other: the same in every process and run."""
    n = like.shape[1]
    wave: Tensor = torch.arange(n, device=like.device, dtype=torch.float64).square().cos() * (2 / n) ** 0.5
    return wave.to(like.dtype)

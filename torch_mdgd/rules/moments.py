"""Second moments C = mean of x xᵀ of what enters a layer: whole, or as a few directions and an isotropic rest.

A low-rank C is never formed. Rows R of some hundred inputs and the directions of all earlier ones are decomposed
together, and the largest are kept: R ≈ the top singular vectors times their singular values, so C ≈ RᵀR / n. What the
directions leave of the trace is spread evenly over all other directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# How many inputs of one batch are decomposed; the trace is of all.
SAMPLE = 512


@dataclass(eq=False)
class Moments:
    """Sums over inputs.

    Attributes:
        sums: Σ x xᵀ, shape (width, width); or rows R with RᵀR ≈ Σ x xᵀ, shape (2 · rank, width). At least float32.
        size: Σ ‖x‖² and the number of inputs, float64, shape (2,).
        rank: of the low-rank form; None for the whole one.
    """

    sums: Tensor
    size: Tensor
    rank: int | None

    @classmethod
    def empty(cls, width: int, rank: int | None, like: Tensor) -> "Moments":
        """Of no inputs."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        height = width if rank is None else 2 * rank
        sums = torch.zeros(height, width, dtype=dtype, device=like.device)
        return cls(sums, torch.zeros(2, dtype=torch.float64, device=like.device), rank)

    @classmethod
    def of(cls, x: Tensor, width: int, rank: int | None, like: Tensor) -> "Moments":
        """Of inputs x, shape (n, width or width − 1): without the 1 of a bias, it is put behind them."""
        out = cls.empty(width, rank, like)
        x = x.detach().to(out.sums.dtype)
        if x.shape[1] < width:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        out.size = torch.stack([x.square().sum(dtype=torch.float64), out.size.new_tensor(float(len(x)))])
        if rank is None:
            out.sums = x.T @ x
        elif len(x) and bool(out.size.isfinite().all()):
            # Else they are left out of every sum, by their size.
            n = min(len(x), SAMPLE)
            chosen = x[torch.linspace(0, len(x) - 1, n, dtype=torch.float64, device=x.device).round().long()]
            out.sums = _largest(chosen * (len(x) / n) ** 0.5, 2 * rank)
        return out

    def to(self, device: torch.device) -> "Moments":
        """The same on another device."""
        return Moments(self.sums.to(device), self.size.to(device), self.rank)

    def plus(self, others: Sequence["Moments"]) -> "Moments":
        """The sum; this one alone if a sum is not finite, as of a step that a gradient scaler skips."""
        size = sum((other.size for other in others), start=self.size)
        if not bool(size.isfinite().all()):
            return self
        if self.rank is None:
            return Moments(sum((other.sums for other in others), start=self.sums), size, None)
        stacked = torch.cat([self.sums, *(other.sums for other in others)])
        return Moments(_largest(stacked, 2 * self.rank), size, self.rank)

    def gathered(self, group: Any) -> list["Moments"]:
        """Those of all processes of a group."""
        world = torch.distributed.get_world_size(group)
        sums = [torch.empty_like(self.sums) for _ in range(world)]
        sizes = [torch.empty_like(self.size) for _ in range(world)]
        torch.distributed.all_gather(sums, self.sums.contiguous(), group)
        torch.distributed.all_gather(sizes, self.size, group)
        return [Moments(x, n, self.rank) for x, n in zip(sums, sizes, strict=True)]

    def covariance(self, size: Tensor | None = None) -> "Covariance":
        """Mean of x xᵀ, divided by a size, or by the mean of its own diagonal; zero if there was no input.

        Args:
            size: float64 scalar.
        """
        width, count = self.sums.shape[1], self.size[1]
        size = self.size[0] / (width * count) if size is None else size
        unit = torch.where(size * count > 0, 1 / (size * count), 0).to(self.sums.dtype)
        if self.rank is None:
            return Covariance(self.sums, unit, None)
        rank, total = min(self.rank, width), self.size[0].to(self.sums.dtype)
        rows = self.sums[:rank]
        lengths = rows.square().sum(1)
        rest = (total - lengths.sum()).clamp(min=0) / (width - rank) if width > rank else torch.zeros_like(total)
        # Along a direction there is as much as its length says, and not the rest besides.
        shrink = torch.where(lengths > 0, (1 - rest / lengths).clamp(min=0), 0)
        return Covariance(rows, shrink * unit, float(rest * unit))


@dataclass(eq=False)
class Covariance:
    """C, without numbers of its own beside those of the moments, which layers share.

    Attributes:
        matrix: Σ x xᵀ, shape (width, width); or rows Y, shape (rank, width).
        unit: of which C is the multiple, 0 dimensions; or what each row is weighted with, shape (rank,).
        rest: None; or C = Yᵀ diag(unit) Y + rest · I.
    """

    matrix: Tensor
    unit: Tensor
    rest: float | None

    def after(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """D C of a matrix D that is given by groups of columns, by the same groups.

        Args:
            parts: shape (m, widths), whose widths add up to C's.
        """
        left, columns = self._along(parts)
        if self.rest is None:
            return [left @ y for y in columns]
        return [torch.addmm(x, left, y, beta=self.rest) for x, y in zip(parts, columns, strict=True)]

    def add_(self, out: Sequence[Tensor | None], parts: Sequence[Tensor], factor: float) -> None:
        """Add a multiple of D C to matrices of the shapes of D's groups, which may be overwritten."""
        left, columns = self._along(parts)
        for target, x, y in zip(out, parts, columns, strict=True):
            if target is None:
                continue
            if self.rest is not None:
                target.add_(x.addmm_(left, y, beta=factor * self.rest, alpha=factor))
            elif target.dtype == y.dtype:
                target.addmm_(left, y, alpha=factor)
            else:
                target.add_(left @ y, alpha=factor)

    def _along(self, parts: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """What is left of D C but its last product with each group of columns, and the rest."""
        widths = [x.shape[1] for x in parts]
        columns = self.matrix.split(widths, dim=1)
        if self.rest is None:
            whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
            return whole * self.unit, columns
        first, *others = (x @ y.T for x, y in zip(parts, columns, strict=True))
        return sum(others, start=first) * self.unit, columns


def _largest(rows: Tensor, count: int) -> Tensor:
    """The top singular vectors of rows times their singular values, largest first, filled up with zeros."""
    wide = rows.double()
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors
    top = vectors.flip(-1)[:, :count]
    out = torch.zeros(count, rows.shape[1], dtype=rows.dtype, device=rows.device)
    out[: top.shape[1]] = (top.T @ wide).to(rows.dtype)
    return out

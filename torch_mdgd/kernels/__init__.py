"""The three operations that everything else is made of, each over a list of tensors.

Kernels know nothing of optimizers: they take roles (lists of tensors in parameter order) and numbers.
"""

from collections.abc import Sequence

from torch import Tensor

from torch_mdgd.kernels import eager
from torch_mdgd.kernels.types import Role

__all__ = ["Role", "combine_", "inner_products", "top_k_masks"]


def inner_products(rows: Sequence[Role], columns: Sequence[Role] | None = None) -> Tensor:
    """All inner products ⟨rows[r][t], columns[c][t]⟩ in one pass over the data.

    Args:
        rows: R roles of T tensors each; within a parameter t all tensors have one shape, dtypes may differ.
        columns: C roles; the rows themselves if None.

    Returns:
        float64 tensor of shape (T, R, C) on the device of the first tensor, accumulated in float64
        (fact: float32 sums over millions of numbers are off in the fourth digit). No host sync.
    """
    return eager.inner_products(rows, rows if columns is None else columns)


def combine_(
    out: Role, roles: Sequence[Role], coefficients: Tensor, masks: Sequence[Tensor | None] | None = None
) -> None:
    """Write out[t] = masks[t] · Σ_r coefficients[t, r] · roles[r][t], in one pass and in place.

    Args:
        out: T tensors, or None where nothing is to be written; each may be one of the roles' own tensors.
        roles: R roles of T tensors; None counts as zero.
        coefficients: shape (T, R), float64. A zero coefficient still carries NaN and Inf along.
        masks: bool tensors of the parameters' shapes, None for an unmasked parameter. A product, so that NaN
            and Inf outside the mask stay visible.

    Sums in float32 (float64 for float64 tensors) and rounds once to out's dtype.
    """
    eager.combine_(out, roles, coefficients, masks)


def top_k_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks of exactly the k largest scores of all tensors together.

    Ties go to the lowest index, counting through the list in order. NaN must be ruled out by the caller.

    Args:
        scores: floating tensors on one device.
        k: 1 ≤ k ≤ total count.

    Returns:
        bool tensors of the scores' shapes, with k true values in all.
    """
    return eager.top_k_masks(scores, k)

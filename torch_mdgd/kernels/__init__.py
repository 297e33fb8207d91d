"""The operations that everything else is made of, each over a list of tensors, on the backend that suits it.

Kernels know nothing of optimizers: they take roles (lists of tensors in parameter order) and numbers.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from torch_mdgd.kernels.dispatch import backend_for, backend_module, use_backend
from torch_mdgd.kernels.types import Role, Similarity

__all__ = [
    "Role",
    "Similarity",
    "backend_for",
    "combine_",
    "inner_products",
    "top_k_masks",
    "top_k_similarity_masks",
    "use_backend",
]


@torch.no_grad()
def inner_products(rows: Sequence[Role], columns: Sequence[Role] | None = None) -> Tensor:
    """All inner products ⟨rows[r][t], columns[c][t]⟩ in one pass over the data.

    Args:
        rows: R roles of T tensors each; within a parameter t all tensors have one shape, dtypes may differ.
        columns: C roles; the rows themselves if None.

    Returns:
        float64 tensor of shape (T, R, C) on the device of the first tensor, summed so that its error is about
        1e-7 of ‖x‖‖y‖ at any length and scale (a plain float32 sum is off in the fourth digit at a few million
        numbers), and 1e-16 for float64 tensors. NaN and Inf come through. The same data on the same device and
        with as many threads give the same bits. No host sync.
    """
    columns = rows if columns is None else columns
    return cast(Tensor, backend_module(*rows, *columns).inner_products(rows, columns))


@torch.no_grad()
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
    backend_module(out).combine_(out, roles, coefficients, masks)


@torch.no_grad()
def top_k_masks(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks of exactly the k largest scores of all tensors together.

    Ties go to the lowest index, counting through the list in order; −0 and +0 tie. Time is linear in the count.

    Args:
        scores: floating tensors on one device.
        k: 1 ≤ k ≤ total count.

    Returns:
        bool tensors of the scores' shapes, with k true values in all.

    Raises:
        ValueError: k is out of range, or there is a NaN (the message names its tensor).
    """
    return cast("list[Tensor]", backend_module(scores).top_k_masks(scores, k))


@torch.no_grad()
def top_k_similarity_masks(
    g: Role, v: Role, g0: Role, a: Tensor | None, k: int, similarity: Similarity = torch.mul
) -> list[Tensor | None]:
    """The masks of the k largest scores s[t] = similarity(g[t] − a[t] · v[t], g0[t]), which never exist as a whole.

    The scores are computed block by block in float64, so that products of tiny or huge numbers keep their order.

    Args:
        g: T tensors on one device; None counts as zero, here and below.
        v: T tensors.
        g0: T tensors.
        a: shape (T,), float64; zeros if None (v is then not read).
        k: 1 ≤ k ≤ total count.
        similarity: elementwise on two float64 blocks of one shape.

    Returns:
        bool tensors with k true values in all, chosen as by :func:`top_k_masks`; None where g, v and g0 are None.

    Raises:
        ValueError: k is out of range, or a score is NaN (the message names its parameter).
    """
    return cast("list[Tensor | None]", backend_module(g, v, g0).top_k_similarity_masks(g, v, g0, a, k, similarity))

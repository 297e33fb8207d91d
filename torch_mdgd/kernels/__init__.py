"""The operations that everything else is made of, each over a list of tensors, on the backend that suits it.

Kernels know nothing of optimizers: they take vectors (lists of tensors in parameter order) and numbers. Sharded tensors
(DTensors) are taken as the whole tensors that they are: kernels run on the shards, and sums go over all processes.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from torch_mdgd.kernels import shards
from torch_mdgd.kernels.dispatch import backend_for, backend_module, use_backend
from torch_mdgd.kernels.types import Tensors
from torch_mdgd.parallel.dtensor import any_sharded, is_sharded, local, sum_shards_

__all__ = [
    "Tensors",
    "backend_for",
    "combine_",
    "inner_products",
    "ratio",
    "top_k_masks",
    "top_k_similarity_masks",
    "use_backend",
]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, and 0 where the denominator is 0: projecting on a zero vector removes nothing.

    NaN stays NaN.
    """
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


@torch.no_grad()
def inner_products(rows: Sequence[Tensors], columns: Sequence[Tensors] | None = None) -> Tensor:
    """All inner products ⟨rows[r][t], columns[c][t]⟩ in one pass over the data.

    Args:
        rows: R vectors of T tensors each; within a parameter t all tensors have one shape, dtypes may differ.
        columns: C vectors; the rows themselves if None.

    Returns:
        float64 tensor of shape (T, R, C) on the device of the first tensor, the same in all processes. Its error is
        about 1e-7 of ‖x‖‖y‖ at any length and scale (a plain float32 sum is off in the fourth digit at a few million
        numbers), and 1e-16 for float64 tensors. NaN and Inf come through. The same data on the same device and
        backend with as many threads give the same bits. No host sync.
    """
    left = [local(vector) for vector in rows]
    right = left if columns is None else [local(vector) for vector in columns]
    table = cast(Tensor, backend_module(*left, *right).inner_products(left, right))
    every = (*rows, *(columns or ()))
    if not any_sharded(every):
        return table
    return sum_shards_(table, [next((x for x in xs if x is not None), None) for xs in zip(*every, strict=True)])


@torch.no_grad()
def combine_(
    out: Tensors, vectors: Sequence[Tensors], coefficients: Tensor, masks: Sequence[Tensor | None] | None = None
) -> None:
    """Write out[t] = masks[t] · Σ_r coefficients[t, r] · vectors[r][t], in one pass and in place.

    Args:
        out: T tensors, or None where nothing is to be written; each may be one of the vectors' own tensors.
        vectors: R vectors of T tensors; None counts as zero.
        coefficients: shape (T, R), float64. A zero coefficient still carries NaN and Inf along.
        masks: bool tensors of the parameters' shapes, None for an unmasked parameter. A product, so that NaN
            and Inf outside the mask stay visible.

    Sums in float32 (float64 for float64 tensors) and rounds once to out's dtype.
    """
    parts = [local(vector) for vector in vectors]
    here: Tensors = local(out)
    if masks is None and coefficients.device.type == "cpu" and not torch.compiler.is_compiling():
        here = _unfinished(here, parts, coefficients)
    if any(x is not None for x in here):
        backend_module(here).combine_(here, parts, coefficients, None if masks is None else local(masks))


def _unfinished(out: Tensors, vectors: Sequence[Tensors], coefficients: Tensor) -> Tensors:
    """Out, with None for a tensor that is its own sum: the first vector's, taken once, where no other has one."""
    first, *others = vectors
    if any(all([x is not None for x in vector]) for vector in others):
        return out
    once = (coefficients[:, 0] == 1).tolist()
    alone = [all([x is None for x in xs]) for xs in zip(*others, strict=True)] if others else [True] * len(first)
    rows = zip(out, first, once, alone, strict=True)
    return [None if x is one and is_once and is_alone else x for x, one, is_once, is_alone in rows]


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
    if any(map(is_sharded, scores)):
        return shards.top_k_masks(scores, k)
    return cast("list[Tensor]", backend_module(scores).top_k_masks(scores, k))


@torch.no_grad()
def top_k_similarity_masks(g: Tensors, v: Tensors, g0: Tensors, a: Tensor | None, k: int) -> list[Tensor | None]:
    """The masks of the k largest scores s[t] = (g[t] − a[t] · v[t]) ⊙ g0[t], which never exist as a whole.

    The scores are computed block by block in float64, so that products of tiny or huge numbers keep their order.

    Args:
        g: T tensors on one device; None counts as zero. Of sharded tensors there is no None.
        v: T tensors, as g.
        g0: T tensors, as g.
        a: shape (T,), float64; zeros if None (v is then not read).
        k: 1 ≤ k ≤ total count.

    Returns:
        bool tensors with k true values in all, chosen as by :func:`top_k_masks`; None where g, v and g0 are None.

    Raises:
        ValueError: k is out of range, or a score is NaN (the message names its parameter).
    """
    if any(map(is_sharded, g)):
        scale = torch.zeros(len(g), dtype=torch.float64, device="cpu") if a is None else a
        whole = [cast("Sequence[Tensor]", vector) for vector in (g, v, g0)]
        return list(shards.top_k_similarity_masks(whole, scale, k))
    return cast("list[Tensor | None]", backend_module(g, v, g0).top_k_similarity_masks(g, v, g0, a, k))

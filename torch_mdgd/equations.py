"""Equations (6)-(11) of MDGD, in the paper's order and letters.

Wu et al., Findings of EMNLP 2025, arXiv 2502.11740. The published text has lost its formulas; these forms are
a reconstruction from the words around each equation number.

    g, v      gradients of the task loss and of the visual alignment loss at the current weights θ
    g0, v0    the same two at the reference weights φ
    g~, g~0   what is left of g and g0 without their components along v and v0

The first half states each equation for one flat float64 vector: slow, and the oracle of the tests. The second
half computes the same for a list of tensors through the kernels, where each equation is a handful of scalars per
parameter: every result is a linear combination of g, v and g~0.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_mdgd import sharded
from torch_mdgd.kernels import Role
from torch_mdgd.settings import Group, Update

Similarity = Callable[[Tensor, Tensor], Tensor]

# --------------------------------------------------------------------------------------------------------------
# One vector, float64.


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, and 0 where the denominator is 0: projecting on a zero vector removes nothing.

    At the first step θ = φ, so v = v0 = 0 exactly and this is the rule that decides (6)-(8). NaN stays NaN.
    """
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / denominator)


def decouple(g: Tensor, v: Tensor) -> Tensor:
    """(6) g~ = g − (⟨g, v⟩ / ⟨v, v⟩) v; with g0 and v0 it is (7)."""
    return g - ratio(g @ v, v @ v) * v


def regularizer(g_tilde: Tensor, g0_tilde: Tensor) -> Tensor:
    """(8) r = (⟨g~, g~0⟩ / ⟨g~0, g~0⟩) g~0."""
    return ratio(g_tilde @ g0_tilde, g0_tilde @ g0_tilde) * g0_tilde


def mdgd(
    g: Tensor, v: Tensor, g0: Tensor, v0: Tensor, align: float, regularize: float, update: Update = "regularize"
) -> Tensor:
    """(9) d = g + α v + β r, or with ``update`` the two other readings: r + α v and g~ + α v."""
    g_tilde = decouple(g, v)
    r = regularizer(g_tilde, decouple(g0, v0))
    if update == "regularize":
        return g + align * v + regularize * r
    if update == "reference":
        return r + align * v
    return g_tilde + align * v


product: Similarity = torch.mul
"""(10) s = g~ ⊙ g~0, the similarity of each number's two gradients."""


def sign_agreement(g_tilde: Tensor, g0_tilde: Tensor) -> Tensor:
    """1 where g~ and g~0 point the same way, −1 where they differ, 0 where one is zero: another reading of (10)."""
    return torch.sign(g_tilde) * torch.sign(g0_tilde)


def mdgd_gm(g: Tensor, v: Tensor, mask: Tensor, align: float) -> Tensor:
    """(11) d = M ⊙ (g + α v)."""
    return mask * (g + align * v)


# --------------------------------------------------------------------------------------------------------------
# Lists of tensors. T parameters; inner products are float64 and have shape (T, ...).


def pool(products: Tensor, together: Tensor) -> Tensor:
    """Inner products in the scope of each parameter.

    Args:
        products: shape (T, ...), one row per parameter.
        together: bool, shape (T,): the parameters of scope "global", whose rows become their common sum.
    """
    where = together.to(products.device).view(-1, *[1] * (products.dim() - 1))
    return torch.where(where, torch.where(where, products, torch.zeros_like(products)).sum(0, keepdim=True), products)


def decouple_reference_(g0: Role, v0: Role, together: Tensor) -> list[Tensor | None]:
    """(7) for a list: g~0, written over g0 (or over v0 where a parameter has no g0; then it is zero).

    g~0 is formed before anything is multiplied with it: ⟨g~0, g~0⟩ from the expanded square would lose every digit
    when g0 is nearly parallel to v0.
    """
    out = [x if x is not None else y for x, y in zip(g0, v0, strict=True)]
    products = pool(sharded.inner_products([g0, v0], [v0]), together)
    b = ratio(products[:, 0, 0], products[:, 1, 0])
    sharded.combine_(out, [g0, v0], torch.stack([torch.ones_like(b), -b], dim=1))
    return out


def drift(products: Tensor) -> Tensor:
    """⟨g, v⟩ / ⟨v, v⟩ of (6), from the table of inner products of (g, v, ...); shape (T,)."""
    return ratio(products[:, 0, 1], products[:, 1, 1])


def agreement(products: Tensor) -> Tensor:
    """⟨g~, g~0⟩ / ⟨g~0, g~0⟩ of (8), from the table of (g, v, g~0); shape (T,).

    ⟨g~, g~0⟩ = ⟨g, g~0⟩ − a ⟨v, g~0⟩ is linear in g~, so that g~ need not be formed: r is off by no more than the
    rounding of g, as it would be with g~ formed in the precision of the gradients.
    """
    return ratio(products[:, 0, 2] - drift(products) * products[:, 1, 2], products[:, 2, 2])


def coefficients(products: Tensor, update: Update, align: float | Tensor, regularize: float, masked: bool) -> Tensor:
    """What (9), its two other readings, or under a mask (11) multiply g, v and g~0 with.

    Args:
        products: inner products of (g, v) or of (g, v, g~0), shape (T, 2, 2) or (T, 3, 3). Without g~0 there is no
            r, and g takes its place.
        update: see :func:`mdgd`.
        align: α, or a scalar on the device of the products.
        regularize: β; unused under a mask, where the mask takes the place of the regulariser.
        masked: whether the result is for (11).

    Returns:
        shape (T, 2) or (T, 3). All vectors have one, if it is 0, since the kernel carries NaN and Inf along even then:
        they reach ``.grad`` also from a vector that the update does not add.
    """
    roles = products.shape[-1]
    out = torch.zeros(products.shape[:2], dtype=products.dtype, device=products.device)
    out[:, 1] = align
    if update == "reference" and roles == 3:
        out[:, 2] = agreement(products)
    else:
        out[:, 0] = 1
    if update == "project":
        out[:, 1] -= drift(products)
    if update == "regularize" and not masked and roles == 3:
        out[:, 2] = regularize * agreement(products)
    return out


def coefficients_of_groups(
    products: Tensor, groups: Sequence[Group], masked: bool, strength: Tensor | float = 1.0
) -> Tensor:
    """:func:`coefficients` with the settings of each parameter's group, in one table; ``strength`` multiplies α."""
    rows, start = [], 0
    for group in groups:
        stop = start + len(group["params"])
        update, align, regularize = group["update"], group["align"] * strength, group["regularize"]
        if group["space"] == "step":  # the wrapped optimizer gets g itself
            update, align, regularize = "regularize", 0.0, 0.0
        rows.append(coefficients(products[start:stop], update, align, regularize, masked))
        start = stop
    return torch.cat(rows)

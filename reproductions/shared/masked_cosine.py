"""How well two decoupled gradients agree where a mask lets numbers move."""

from collections.abc import Sequence

import torch
from torch import Tensor


def masked_cosine(gradients: Sequence[Sequence[Tensor | None]], moved: Sequence[Tensor]) -> float:
    """The cosine of M ⊙ g̃ (6) and M ⊙ g̃₀ (7), of gradients g, v, g₀, v₀ by parameter; 0 if one is zero."""
    sums = torch.zeros(3, dtype=torch.float64)
    for g, v, g0, v0, mask in zip(*gradients, moved, strict=True):
        if g is None or g0 is None:
            continue
        a, b = (_without(x, y)[mask] for x, y in ((g, v), (g0, v0)))
        sums += torch.stack([a @ b, a @ a, b @ b]).cpu()
    length = (sums[1] * sums[2]).sqrt()
    return float(sums[0] / length) if length > 0 else 0.0


def _without(g: Tensor, v: Tensor | None) -> Tensor:
    g = g.double()
    if v is None or not v.any():
        return g
    v = v.double()
    return g - (g * v).sum() / (v * v).sum() * v

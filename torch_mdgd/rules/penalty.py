"""What the anchor adds to a loss for one layer, ½ tr(D C Dᵀ) of the layer's change D, and the gradient of this.

    plain     D = W − W₀, and b − b₀ as one more column where a bias is trained     W, b: D C
    LoRA      D = s (BA − B₀A₀), which is never formed                              A: s BᵀD C     B: s D C Aᵀ

C is the second moment of what enters the layer, see :mod:`torch_mdgd.rules.covariances`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_mdgd.models.linear import Linear
from torch_mdgd.parallel import dtensor
from torch_mdgd.rules.moments import Covariance


def pull_(
    layer: Linear, c: Covariance, g: Any, parameters: Any, difference: Callable[[int], Tensor], factor: float
) -> None:
    """Add a multiple of the gradient to gradients, in place.

    Args:
        layer: whose trained parameters have places.
        c: C of what enters the layer, shape (width, width).
        g: gradients by place; where there is None, the parameter counts as unmoved.
        parameters: θ by place, read of LoRA alone.
        difference: θ − φ of a place, a new tensor; of a sharded parameter, this process's shard.
        factor: of the gradient.
    """
    if layer.lora is None:
        _pull_plain_(layer, c, g, difference, factor)
    else:
        _pull_lora_(layer, c, g, parameters, difference, factor)


def energy(layer: Linear, c: Covariance, theta: Sequence[Tensor], phi: Sequence[Tensor]) -> Tensor:
    """tr(D C Dᵀ), with its graph; a scalar of C's dtype.

    Args:
        layer: whose trained parameters have places.
        c: C of what enters the layer.
        theta: whole parameters by place.
        phi: those of the reference.
    """
    if layer.lora is None:
        parts = _change(layer, (layer.weight, layer.bias), lambda i: theta[i] - phi[i], c.matrix.dtype)
        return torch.stack([(x * y).sum() for x, y in zip(parts, c.after(parts), strict=True)]).sum()
    (A, A0), (B, B0) = _matrices(layer, lambda i: (theta[i], phi[i]), c.matrix.dtype)
    AC, A0C = c.after([A])[0], c.after([A0])[0]
    both = ((B.T @ B) * (AC @ A.T)).sum() - 2 * ((B.T @ B0) * (A @ A0C.T)).sum()
    out: Tensor = (both + ((B0.T @ B0) * (A0C @ A0.T)).sum()) * layer.scaling**2
    return out


def _pull_plain_(layer: Linear, c: Covariance, g: Any, difference: Callable[[int], Tensor], factor: float) -> None:
    live = [None if i is None or g[i] is None else i for i in (layer.weight, layer.bias)]
    parts = _change(layer, live, difference, c.matrix.dtype)
    if parts:
        targets = dtensor.local([None if i is None else g[i] for i in live])
        c.add_([None if x is None else _columns(x) for x in targets[: len(parts)]], parts, factor)


def _pull_lora_(
    layer: Linear, c: Covariance, g: Any, parameters: Any, difference: Callable[[int], Tensor], factor: float
) -> None:
    def at_both(i: int) -> tuple[Tensor, Tensor]:
        value = dtensor.whole(parameters[i].detach())
        return value, value - dtensor.whole(dtensor.as_shard(difference(i), parameters[i]))

    a, b = layer.lora or (None, None)
    (A, A0), (B, B0) = _matrices(layer, at_both, c.matrix.dtype)
    # BA − B₀A₀ as one product, so that few small ones are made.
    left, right = torch.cat([B, -B0], dim=1), c.after([torch.cat([A, A0])])[0]
    factor *= layer.scaling**2
    if a is not None and g[a] is not None:
        _add_(g[a], (B.T @ left) @ right, factor)
    if b is not None and g[b] is not None:
        _add_(g[b], left @ (right @ A.T), factor)


def _change(
    layer: Linear, places: Sequence[int | None], difference: Callable[[int], Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """D of a plain layer: of W, and of b if it is trained; zeros for a place that is None; nothing if both are."""
    found = [None if i is None else _columns(difference(i).to(dtype)) for i in places]
    one = next((x for x in found if x is not None), None)
    if one is None:
        return []
    widths = [layer.width] if layer.bias is None else [layer.width - 1, 1]
    return [one.new_zeros(len(one), n) if x is None else x for x, n in zip(found, widths, strict=False)]


def _matrices(
    layer: Linear, at_both: Callable[[int], tuple[Tensor, Tensor]], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """A and B, each at θ and at φ: by its place if it is trained, else from the module."""
    out = []
    for i, matrices in zip(layer.lora or (), (layer.module.lora_A, layer.module.lora_B), strict=True):
        fixed: Any = matrices
        now, then = (dtensor.whole(fixed[layer.adapter].weight.detach()),) * 2 if i is None else at_both(i)
        out.append((now.to(dtype), then.to(dtype)))
    return out


def _columns(x: Tensor) -> Tensor:
    """A weight as it is, a bias as a matrix of one column."""
    return x if x.dim() == 2 else x[:, None]


def _add_(g: Any, whole: Tensor, factor: float) -> None:
    """Add a whole tensor to a gradient that may be sharded."""
    if dtensor.is_sharded(g):
        whole, g = dtensor.local([dtensor.shard_like(whole, g), g])
    g.add_(whole, alpha=factor)

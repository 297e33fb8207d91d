"""What to look at while fine-tuning: the effective rank of features, and the angles between gradients."""

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_mdgd.equations import agreement, drift, pool, ratio


def effective_rank(Z: Tensor) -> float:
    """exp(−Σ p_i log p_i) with p_i = σ_i / Σσ, the entropy of the singular values (Roy and Vetterli 2007).

    Args:
        Z: features, shape (tokens, channels), any floating dtype; computed in float64, not centred.

    Returns:
        a number between 1 and min(tokens, channels).

    Raises:
        ValueError: ``Z`` is not a matrix, has no entries, is all zero (a zero matrix has no effective rank), or holds
            NaN or Inf.
    """
    if Z.dim() != 2 or Z.numel() == 0:
        raise ValueError(f"effective_rank: Z must be a matrix of features (tokens, channels), got {tuple(Z.shape)}")
    if not Z.isfinite().all():
        raise ValueError("effective_rank: Z holds NaN or Inf")
    sigma = torch.linalg.svdvals(Z.detach().double())
    if sigma[0] == 0:
        raise ValueError("effective_rank: Z is all zero, so its effective rank is undefined")
    return float(torch.special.entr(sigma / sigma.sum()).sum().exp())


def read(
    recorded: Mapping[str, Tensor], products: tuple[Tensor, Tensor] | None, kept: tuple[int, int] | None
) -> dict[str, float]:
    """What ``MDGDOptimizer.diagnostics`` shows: this waits for the device.

    Args:
        recorded: other scalars, by name.
        products: the arguments of :func:`gradient_diagnostics`; None before the first combine.
        kept: how many numbers may move, of how many; None without a mask.
    """
    values = {**recorded, **(gradient_diagnostics(*products) if products else {})}
    out = {name: float(value) for name, value in values.items()}
    return out if kept is None else {**out, "kept_fraction": kept[0] / kept[1]}


def gradient_diagnostics(products: Tensor, together: Tensor) -> dict[str, Tensor]:
    """Angles and lengths over all parameters, from the inner products of one step.

    Args:
        products: inner products of (g, v), shape (T, 2, 2), or of (g, v, g~0), shape (T, 3, 3).
        together: bool, shape (T,): parameters of scope "global".

    Returns:
        scalars on the same device: ``cos_task_visual`` = cos(g, v), ``visual_to_task`` = ‖v‖/‖g‖ and, with a
        reference, ``cos_task_reference`` = cos(g~, g~0) and ``regularizer_to_task`` = ‖r‖/‖g‖. A zero vector has
        cosine 0 with everything.
    """
    scoped = pool(products, together)
    total = products.sum(0)
    g_norm, v_norm = total[0, 0].sqrt(), total[1, 1].sqrt()
    out = {
        "cos_task_visual": ratio(total[0, 1], g_norm * v_norm),
        "visual_to_task": ratio(v_norm, g_norm),
    }
    if products.shape[-1] == 3:
        a, c = drift(scoped), agreement(scoped)
        gg, gv, gs = products[:, 0].unbind(1)
        vv, vs, ss = products[:, 1, 1], products[:, 1, 2], products[:, 2, 2]
        g_tilde_norm = (gg - 2 * a * gv + a * a * vv).sum().clamp(min=0).sqrt()
        out["cos_task_reference"] = ratio((gs - a * vs).sum(), g_tilde_norm * ss.sum().sqrt())
        out["regularizer_to_task"] = ratio((c * c * ss).sum().sqrt(), g_norm)
    return out

"""What to look at while fine-tuning: the effective rank of features, and the angles between gradients."""

import torch
from torch import Tensor

from torch_mdgd.kernels import ratio
from torch_mdgd.rules.base import agreement, drift


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


def gradient_diagnostics(products: Tensor) -> dict[str, Tensor]:
    """Angles and lengths over all parameters, from the inner products of one step.

    Args:
        products: inner products of (g), (g, v) or (g, v, g̃₀), float64, shape (T, R, R).

    Returns:
        scalars on the same device: with R > 1 ``cos_task_visual`` = cos(g, v) and ``visual_to_task`` = ‖v‖/‖g‖; with
        R = 3 ``cos_task_reference`` = cos(g̃, g̃₀) and ``regularizer_to_task`` = ‖r‖/‖g‖. A zero vector has cosine 0
        with everything.
    """
    if products.shape[-1] == 1:
        return {}
    total = products.sum(0)
    g_norm, v_norm = total[0, 0].sqrt(), total[1, 1].sqrt()
    out = {
        "cos_task_visual": ratio(total[0, 1], g_norm * v_norm),
        "visual_to_task": ratio(v_norm, g_norm),
    }
    if products.shape[-1] == 3:
        a = drift(products)
        c = agreement(products, a)
        gg, gv, gs = products[:, 0].unbind(1)
        vv, vs, ss = products[:, 1, 1], products[:, 1, 2], products[:, 2, 2]
        g_tilde_norm = (gg - 2 * a * gv + a * a * vv).sum().clamp(min=0).sqrt()
        out["cos_task_reference"] = ratio((gs - a * vs).sum(), g_tilde_norm * ss.sum().sqrt())
        out["regularizer_to_task"] = ratio((c * c * ss).sum().sqrt(), g_norm)
    return out

"""The equations as one would first write them down: the baseline, and a check of the library's result."""

import torch
from torch import Tensor


def project(g: Tensor, v: Tensor) -> Tensor:
    """(6) What is left of g without its component along v."""
    return g - (torch.dot(g, v) / torch.dot(v, v)) * v


def mdgd(g: Tensor, v: Tensor, g0: Tensor, v0: Tensor, align: float = 1.0, regularize: float = 1.0) -> Tensor:
    """(6)-(9) for four flat vectors."""
    g_tilde = project(g, v)
    g0_tilde = project(g0, v0)
    r = (torch.dot(g_tilde, g0_tilde) / torch.dot(g0_tilde, g0_tilde)) * g0_tilde
    return g + align * v + regularize * r

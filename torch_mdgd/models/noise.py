"""Equal weights must give equal features: what is left between z and z(φ) is drift, and no rounding.

Some attention takes another kernel where no gradients are wanted, as SAM's with its bias and ``nn.TransformerEncoder``
in evaluation mode. A pass at φ without gradients then differs from one at θ by rounding, and the sign in the gradient
of L1 makes a gradient of full length of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_mdgd.models.passes import known_of


def without_noise(
    z: Tensor,
    z_fixed: Tensor,
    again: Callable[[], Tensor],
    text_module: nn.Module,
    *,
    unmoved: Callable[[], bool] = lambda: False,
    anywhere: Callable[[bool], bool] = bool,
) -> Tensor:
    """The features to compare z with, such that what is left is drift.

    The first time that z and z_fixed differ by so little that it might be rounding, or although nothing has moved, the
    pass of z is run again without gradients. If that changes z, it is known of the text module from then on, and
    :meth:`VisualTap.features <torch_mdgd.models.tap.VisualTap.features>` takes its passes with gradients.

    Args:
        z: features of a pass with gradients, shape (rows, hidden).
        z_fixed: those at the other weights, of a pass without.
        again: z of a pass without gradients at the weights of z.
        text_module: whose features they are.
        unmoved: whether both weights are the same.
        anywhere: whether a statement holds in any of the processes that train together.

    Returns:
        z_fixed; or in the step that has found noise, z less the drift of passes without gradients.
    """
    known = known_of(text_module)
    if known.other_kernels is not None:
        return z_fixed
    here = z.detach()
    if not anywhere(bool(here.numel())):
        # No picture, from which nothing is known.
        return z_fixed
    difference = float((here.float() - z_fixed.float()).abs().max()) if here.numel() else 0.0
    largest = float(here.float().abs().max()) if here.numel() else 0.0
    small = max(1e-3, 64 * torch.finfo(here.dtype).eps) * largest
    if not anywhere(difference > 0 and (difference <= small or unmoved())):
        known.other_kernels = False
        return z_fixed
    z_again = again()
    known.other_kernels = anywhere(not torch.equal(z_again, here))
    return here - (z_again - z_fixed) if known.other_kernels else z_fixed

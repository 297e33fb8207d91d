"""Modality-decoupled gradient descent for torch: fine-tune a vision-language model without blinding it.

Wrap the optimizer in :class:`MDGDOptimizer` and call :func:`mdgd_backward` in place of ``loss.backward()``.
"""

from torch_mdgd.backward import mdgd_backward
from torch_mdgd.delta import apply_delta, save_delta
from torch_mdgd.diagnostics import effective_rank
from torch_mdgd.inputs import VisualInputs
from torch_mdgd.masking import Given, Magnitude, Random, TopK
from torch_mdgd.optimizer import MDGDOptimizer
from torch_mdgd.parts import connector, freeze_all_but, last_decoder_layers
from torch_mdgd.visual import VisualTap, visual_alignment_loss

__all__ = [
    "Given",
    "MDGDOptimizer",
    "Magnitude",
    "Random",
    "TopK",
    "VisualInputs",
    "VisualTap",
    "apply_delta",
    "connector",
    "effective_rank",
    "freeze_all_but",
    "last_decoder_layers",
    "mdgd_backward",
    "save_delta",
    "visual_alignment_loss",
]

"""Modality-decoupled gradient descent for torch: fine-tune a vision-language model without blinding it.

Wrap the optimizer in :class:`MDGDOptimizer` and call :func:`mdgd_backward` in place of ``loss.backward()``.
What becomes of the gradients is a rule: see :mod:`torch_mdgd.rules`. Which elements may move is a mask: see
:mod:`torch_mdgd.masks`. A fine-tune as a small file is a delta: see :mod:`torch_mdgd.delta`.
"""

from torch_mdgd import delta, masks, rules
from torch_mdgd.backward import mdgd_backward
from torch_mdgd.diagnostics import effective_rank
from torch_mdgd.masks import Given, Magnitude, Random, TopK
from torch_mdgd.models.parts import connector, freeze_all_but, last_decoder_layers
from torch_mdgd.models.tap import VisualTap, visual_alignment_loss
from torch_mdgd.optimizer import MDGDOptimizer
from torch_mdgd.rules import MDGD, Anchor, DriftBudget, Project, ProtectInputs, Rule, StepProject

__all__ = [
    "MDGD",
    "Anchor",
    "DriftBudget",
    "Given",
    "MDGDOptimizer",
    "Magnitude",
    "Project",
    "ProtectInputs",
    "Random",
    "Rule",
    "StepProject",
    "TopK",
    "VisualTap",
    "connector",
    "delta",
    "effective_rank",
    "freeze_all_but",
    "last_decoder_layers",
    "masks",
    "mdgd_backward",
    "rules",
    "visual_alignment_loss",
]

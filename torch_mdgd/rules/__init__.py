"""Rules: what becomes of the captured gradients in one step. One rule a file; :class:`Rule` is the base of your own."""

from torch_mdgd.rules.anchor import Anchor
from torch_mdgd.rules.base import Rule
from torch_mdgd.rules.budget import DriftBudget
from torch_mdgd.rules.inputs import ProtectInputs
from torch_mdgd.rules.mdgd import MDGD
from torch_mdgd.rules.project import Project
from torch_mdgd.rules.step import StepProject

__all__ = ["MDGD", "Anchor", "DriftBudget", "Project", "ProtectInputs", "Rule", "StepProject"]

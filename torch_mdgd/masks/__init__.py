"""Masks: which elements may move. One mask a file; :class:`Mask` is the base of your own."""

from torch_mdgd.masks.base import Mask, ScoreInputs
from torch_mdgd.masks.given import Given
from torch_mdgd.masks.magnitude import Magnitude
from torch_mdgd.masks.random import Random
from torch_mdgd.masks.top_k import TopK

__all__ = ["Given", "Magnitude", "Mask", "Random", "ScoreInputs", "TopK"]

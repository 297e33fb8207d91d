"""The one shape of data that every kernel takes."""

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

Tensors: TypeAlias = Sequence[Tensor | None]
"""A vector in parts: one tensor per parameter, in parameter order; None counts as zero."""

"""The one shape of data that every kernel takes."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

# One tensor per parameter, in parameter order; None where a parameter has no gradient (it counts as zero).
Role: TypeAlias = Sequence[Tensor | None]

# A number for each pair of numbers of two blocks, elementwise: how much an update there serves the reference.
Similarity: TypeAlias = Callable[[Tensor, Tensor], Tensor]

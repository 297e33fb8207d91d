"""Where φ, the mask and the wrapped optimizer's state live: at full size, or for the numbers inside the mask alone."""

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from torch_mdgd.compact import CompactStorage
from torch_mdgd.dense import DenseStorage
from torch_mdgd.masking import Mask

Storage: TypeAlias = DenseStorage | CompactStorage

NO_REFERENCE = "the state dict holds no reference: it stays at the wrapped weights: right if training began there"


def storage_for(parameters: Sequence[Tensor], base: Optimizer, mask: Mask | None, compact: bool) -> Storage:
    """The storage that the arguments of an MDGDOptimizer ask for; a mask that needs no scores is chosen now.

    Raises:
        ValueError: compact without a mask.
        TypeError: an argument of another kind, naming it; compact with an optimizer that it is not for, see
            :class:`torch_mdgd.compact.CompactStorage`.
    """
    if mask is not None and (isinstance(mask, type) or not isinstance(mask, Mask)):
        raise TypeError(f"mask must be such as TopK(0.1), or None, got {mask!r}")
    if not isinstance(compact, bool):
        raise TypeError(f"compact must be True or False, got {compact!r}")
    if compact and mask is None:
        raise ValueError("compact=True keeps the numbers inside a mask: pass one, such as mask=TopK(0.1)")
    storage: Storage = (
        CompactStorage(parameters, base) if compact else DenseStorage(parameters, chooses=mask is not None)
    )
    if mask is not None and not mask.scored:
        storage.choose(mask.choose(parameters, None), base, parameters)
    return storage

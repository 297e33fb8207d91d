"""Where φ, the mask and the wrapped optimizer's state live."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim import ASGD, Optimizer, Rprop

from torch_mdgd.masks.base import Mask
from torch_mdgd.storage.base import Storage
from torch_mdgd.storage.compact import CompactStorage
from torch_mdgd.storage.dense import DenseStorage
from torch_mdgd.storage.exchange import require_apart
from torch_mdgd.storage.host import HostStorage

__all__ = ["Storage", "storage_for"]


def storage_for(
    parameters: Sequence[Tensor], base: Optimizer, mask: Mask | None, compact: bool, offload: bool
) -> Storage:
    """The storage that the arguments of an MDGDOptimizer ask for; no mask is chosen yet.

    Raises:
        ValueError: compact without a mask, with one that is chosen anew, or with offload; offload of what is sharded;
            a parameter that is there twice, or two that share memory.
        TypeError: an argument of another kind, naming it; compact with an optimizer that it is not for, see
            :class:`torch_mdgd.storage.compact.CompactStorage`; a mask that is chosen anew, with Rprop or ASGD.
    """
    require_apart(parameters)
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"mask must be a Mask such as TopK(0.1), or None, got {mask!r}")
    if not isinstance(compact, bool):
        raise TypeError(f"compact must be True or False, got {compact!r}")
    if not isinstance(offload, bool):
        raise TypeError(f"offload must be True or False, got {offload!r}")
    if mask is not None and mask.refresh is not None and isinstance(base, Rprop | ASGD):
        raise TypeError(
            f"{type(base).__name__} keeps state that cannot begin at zero for an element that a later mask lets move: "
            "leave out the mask's refresh"
        )
    if not compact:
        storage: Storage = HostStorage(parameters, mask) if offload else DenseStorage(parameters, mask)
    elif offload:
        raise ValueError("compact=True holds φ of the elements inside the mask alone: leave out offload=True")
    elif mask is None:
        raise ValueError("compact=True keeps the elements inside a mask: pass one, such as mask=TopK(0.1)")
    elif mask.refresh is not None:
        raise ValueError("compact=True keeps one mask: leave out its refresh, or use compact=False")
    else:
        storage = CompactStorage(parameters, mask, base)
    return storage

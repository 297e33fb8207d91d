"""φ in the host's memory: what a GPU that is short of room is spared, for copies over the bus at each pass at φ."""

import torch
from torch import Tensor

from torch_mdgd.parallel import dtensor
from torch_mdgd.storage.dense import DenseStorage

NAME = "offload=True"
INSTEAD = "leave it out, since each process holds φ of its own shard alone"


class HostStorage(DenseStorage):
    """As :class:`DenseStorage`, with φ in pinned memory of the host.

    The exchange goes piece by piece, so that the device holds no second copy at any time: θ lies on the host while φ is
    in the parameters. A pass at φ costs four copies of the trained numbers over the bus.

    Raises:
        ValueError: parameters are sharded.
    """

    def _snapshot(self, p: Tensor) -> Tensor:
        return self._copy(p, p)

    @torch.no_grad()
    def _copy(self, x: Tensor, p: Tensor) -> Tensor:
        dtensor.refuse_sharded(NAME, [p], INSTEAD)
        # Pinned memory is CUDA's.
        held = torch.empty_like(p, device="cpu", requires_grad=False, pin_memory=p.is_cuda)
        return held.copy_(x)

    def _follow(self, held: Tensor, p: Tensor) -> Tensor:
        dtensor.refuse_sharded(NAME, [p], INSTEAD)
        # Pinned once the parameter is on a GPU, as after model.cuda().
        return held if not p.is_cuda or held.is_pinned() else self._copy(held, p)

"""A mask made elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_mdgd.masks.base import Mask, ScoreInputs
from torch_mdgd.parallel import dtensor


@dataclass(frozen=True)
class Given(Mask):
    """A mask of your own making.

    Args:
        masks: bool tensors of the trained parameters' shapes, in parameter order; at least one element is true.
    """

    masks: Sequence[Tensor]

    def choose(self, parameters: Sequence[Tensor], gradients: ScoreInputs | None) -> list[Tensor]:
        """These masks, checked.

        Raises:
            ValueError: they do not fit the parameters, naming the first that does not.
        """
        if len(self.masks) != len(parameters):
            raise ValueError(f"Given: {len(self.masks)} masks for {len(parameters)} trained parameters")
        for i, (mask, p) in enumerate(zip(self.masks, parameters, strict=True)):
            if mask.dtype != torch.bool or mask.shape != p.shape:
                raise ValueError(
                    f"Given: mask {i} is {mask.dtype} of shape {tuple(mask.shape)}, its parameter needs bool of "
                    f"{tuple(p.shape)}"
                )
        masks = [dtensor.shard_like(mask, p) for mask, p in zip(self.masks, parameters, strict=True)]
        if not dtensor.count(masks):
            raise ValueError("Given: no element is true in any mask, so nothing could be trained")
        return masks

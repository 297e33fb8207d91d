"""Elements drawn at random: the simplest mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_mdgd import kernels
from torch_mdgd.checks import require_share
from torch_mdgd.masks.base import Mask, ScoreInputs, kept
from torch_mdgd.parallel import dtensor


@dataclass(frozen=True)
class Random(Mask):
    """A fraction of all elements, drawn at random.

    Args:
        fraction: in (0, 1]; counted exactly, over all trained parameters.
        seed: of the draw, which is the same on every device.

    Raises:
        ValueError: ``fraction`` is out of range.
    """

    fraction: float = 0.10
    seed: int = 0

    def __post_init__(self) -> None:
        require_share("Random: fraction", self.fraction)

    def choose(self, parameters: Sequence[Tensor], gradients: ScoreInputs | None) -> list[Tensor]:
        """A mask for these parameters."""
        generator = torch.Generator(device="cpu").manual_seed(int(self.seed))
        draws = (torch.rand(p.shape, generator=generator, dtype=torch.float64, device="cpu") for p in parameters)
        scores = [dtensor.shard_like(x, p) for x, p in zip(draws, parameters, strict=True)]
        return kernels.top_k_masks(scores, kept(self.fraction, parameters))

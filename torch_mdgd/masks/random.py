"""Elements drawn at random: the simplest mask."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        """A mask for these parameters: those with the largest draws, of which one parameter's are held at a time."""
        least, ties = self._least(parameters)
        masks = []
        for draw, p in zip(self._draws(parameters), parameters, strict=True):
            mask = draw > least
            at = (draw == least).flatten().nonzero().flatten()[:ties]
            mask.view(-1)[at] = True
            ties -= len(at)
            masks.append(dtensor.shard_like(mask, p))
        return masks

    def _draws(self, parameters: Sequence[Tensor]) -> Iterator[Tensor]:
        """Uniform in [0, 1), float64, of each parameter's shape, on the CPU; the same at each call."""
        generator = torch.Generator(device="cpu").manual_seed(int(self.seed))
        for p in parameters:
            yield torch.rand(p.shape, generator=generator, dtype=torch.float64, device="cpu")

    def _least(self, parameters: Sequence[Tensor]) -> tuple[float, int]:
        """The k-th largest draw, and how many of those that equal it are among the k."""
        k, n = kept(self.fraction, parameters), sum(p.numel() for p in parameters)
        # Six deviations of the k-th largest of n uniform draws, about its mean; wider where that misses it.
        width = 6 * math.sqrt(k * max(n - k, 1) / n) / n
        while True:
            low, high = 1 - k / n - width, 1 - k / n + width
            above, near = 0, []
            for draw in self._draws(parameters):
                above += int((draw > high).sum())
                near.append(draw[(draw >= low) & (draw <= high)])
            candidates = torch.cat(near).sort(descending=True).values
            if above < k <= above + len(candidates):
                least = float(candidates[k - above - 1])
                return least, k - above - int((candidates > least).sum())
            width *= 8

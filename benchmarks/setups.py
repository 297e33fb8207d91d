"""What the suites and the tables share: vectors, lists of shapes, and optimizers with their captures set."""

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from torch_mdgd import MDGDOptimizer

Shape = tuple[int, ...]
KINDS = ("task", "visual", "reference_task", "reference_visual")
DRAWN = 1 << 22


def decoder_layer(hidden: int, inner: int) -> list[Shape]:
    """The weights of one Llama decoder layer: attention, gated MLP, two norms."""
    square, up, down = (hidden, hidden), (inner, hidden), (hidden, inner)
    return [square, square, square, square, up, up, down, (hidden,), (hidden,)]


def llava(divide: int = 1) -> list[Shape]:
    """LLaVA-1.5-7B: the last 6 decoder layers and the projector, 58 tensors; every width divided by ``divide``."""
    vision, hidden, inner = 1024 // divide, 4096 // divide, 11008 // divide
    return 6 * decoder_layer(hidden, inner) + [(hidden, vision), (hidden,), (hidden, hidden), (hidden,)]


def minicpm() -> list[Shape]:
    """MiniCPM-V-2.0: the last 8 decoder layers and the resampler."""
    vision, hidden = 1152, 2304
    attention = [(3 * hidden, hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    norms = 6 * [(hidden,)]
    return 8 * decoder_layer(hidden, 5760) + [(64, hidden), (hidden, vision), *attention, *norms, (hidden, hidden)]


def count(shapes: Sequence[Shape]) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(map(prod, shapes))


def normal(shape: Shape, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers in memory of their own: pieces of one draw, each from another place and scaled by 0.9 to 1.1.

    To draw them all takes six times as long, and a run makes its vectors anew in every lap.
    """
    out, drawn = torch.empty(shape, dtype=dtype), _drawn()
    for piece in out.view(-1).split(DRAWN):
        place, scale = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        start = int(place * DRAWN)
        ahead, behind = piece.split([min(len(piece), DRAWN - start), max(0, len(piece) - DRAWN + start)])
        torch.mul(drawn[start : start + len(ahead)], 0.9 + 0.2 * scale, out=ahead)
        torch.mul(drawn[: len(behind)], 0.9 + 0.2 * scale, out=behind)
    return out


@cache
def _drawn() -> Tensor:
    return torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))


def gradients(shapes: Sequence[Shape], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, list[Tensor]]:
    """The four gradients of every parameter: normal numbers, correlated as those of one network are.

    Returns:
        per kind a list of tensors of these shapes.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {kind: [normal(shape, generator, dtype) for shape in shapes] for kind in KINDS}
    for kind in KINDS[1:]:
        torch._foreach_add_(found[kind], found["task"], alpha=0.3)
    return found


def parameters(like: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Weights of these tensors' shapes and dtypes, to be trained."""
    generator = torch.Generator().manual_seed(seed)
    return [normal(tuple(x.shape), generator, x.dtype).mul_(0.02).requires_grad_() for x in like]


class Captured:
    """An :class:`MDGDOptimizer` over parameters of given shapes, whose captures can be set again and again.

    ``combine`` writes d over g and g~0 over g0, so every ``prepare`` restores those two first.

    Args:
        originals: the four gradients; their shapes and dtype are the parameters'.
        work: the tensors that are captured and overwritten; made if None, shared between optimizers if given.
        base: makes the wrapped optimizer from the parameters.
        settings: keywords of the :class:`MDGDOptimizer`.
    """

    def __init__(
        self,
        originals: dict[str, list[Tensor]],
        work: dict[str, list[Tensor]] | None = None,
        base: Any = torch.optim.SGD,
        **settings: Any,
    ) -> None:
        self.originals = originals
        self.work = work if work is not None else overwritable(originals)
        self.optimizer = MDGDOptimizer(base(parameters(originals["task"]), lr=1e-6), **settings)

    def prepare(self) -> None:
        """Captures set, nothing combined."""
        self.optimizer.zero_grad()
        for kind, tensors in self.work.items():
            if tensors is not self.originals[kind]:
                torch._foreach_copy_(tensors, self.originals[kind])
        self._capture(KINDS[:2])
        if self.optimizer.needs() == KINDS:
            # Places, which takes no time beside the passes that are timed.
            with self.optimizer.reference(places=True):
                self._capture(KINDS[2:])

    def combine(self) -> Tensor | None:
        """(6)-(9), or whatever the settings ask for; the first parameter's d."""
        self.optimizer.combine()
        return self.optimizer.parameters[0].grad

    def step(self) -> None:
        """Combine, then the wrapped optimizer's step."""
        self.optimizer.step()

    def _capture(self, kinds: Sequence[str]) -> None:
        for kind, given in zip(KINDS, kinds, strict=False):
            with self.optimizer.capture(kind):  # type: ignore[arg-type]
                for p, x in zip(self.optimizer.parameters, self.work[given], strict=True):
                    p.grad = x


def overwritable(originals: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The four gradients with copies of the two that are overwritten."""
    return {
        kind: [x.clone() for x in tensors] if kind.endswith("task") else tensors for kind, tensors in originals.items()
    }

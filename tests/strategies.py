"""Lists of parameters and their gradients, for hypothesis: mixed shapes, dtypes and missing gradients."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_mdgd.rules.base import KINDS

# With fewer numbers g0 may be (nearly) parallel to v0, and then the direction of g~0 is that of a rounding.
LARGE = [(3, 2), (2, 1, 4), (17,), (5, 7)]
SMALL = [(), (1,), (2,)]
WEIGHTS = st.sampled_from([0.0, 0.3, 1.0, 2.5])


@dataclass
class Case:
    """Parameters and, by kind, gradients of their shapes. ``set_gradients`` copies, so these stay as they are."""

    parameters: list[nn.Parameter]
    gradients: dict[str, list[Tensor | None]]

    @property
    def kinds(self) -> list[list[Tensor | None]]:
        return [self.gradients.get(kind) or [None] * len(self.parameters) for kind in KINDS]


def make_case(shapes, dtypes, seed: int, missing=()) -> Case:
    """Normal parameters and gradients; ``missing`` holds (kind, position) pairs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    parameters = [nn.Parameter(normal(s, d)) for s, d in zip(shapes, dtypes, strict=True)]
    gradients = {
        kind: [
            None if (kind, t) in missing else normal(s, d) for t, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
        ]
        for kind in KINDS
    }
    return Case(parameters, gradients)


@st.composite
def cases(draw, dtypes=(torch.float64, torch.float32, torch.bfloat16), missing: bool = True) -> Case:
    shapes = draw(st.lists(st.sampled_from(LARGE if missing else SMALL + LARGE), min_size=1, max_size=4))
    chosen = [draw(st.sampled_from(dtypes)) for _ in shapes]
    absent = set()
    if missing:
        pairs = st.tuples(st.sampled_from(KINDS), st.integers(0, len(shapes) - 1))
        absent = draw(st.sets(pairs, max_size=3))
    return make_case(shapes, chosen, draw(st.integers(0, 2**31)), absent)

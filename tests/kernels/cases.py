"""Lists of tensors for hypothesis: mixed lengths, dtypes, scales, layouts, holes and odd values."""

import os
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

# Empty, one number, and lengths on, below and above the blocks and tiles of the tests.
LENGTHS = st.sampled_from([0, 1, 7, 16, 24, 25, 48, 49, 64, 65, 128, 130, 200, 401])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SCALES = st.sampled_from([1e-20, 1e-5, 1.0, 1e5, 1e20])
KINDS = st.sampled_from(["normal", "normal", "ones", "zeros", "sparse", "denormal"])
LAYOUTS = st.sampled_from(["contiguous", "strided", "offset"])


def denormals_work(dtype: torch.dtype) -> bool:
    """Triton's interpreter converts bfloat16 denormals wrongly, both ways; the instructions of a GPU do not."""
    return dtype != torch.bfloat16 or os.environ.get("TRITON_INTERPRET") != "1"


def tiniest(dtype: torch.dtype) -> float:
    """A denormal, where they work."""
    normal = torch.finfo(dtype).smallest_normal
    return normal / 64 if denormals_work(dtype) else normal


def tensor(length: int, dtype: torch.dtype, scale: float, kind: str, layout: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, generator=generator, dtype=torch.float64) * scale
    if kind == "ones":
        x = torch.full_like(x, 0.1 * scale)
    elif kind == "zeros":
        x.zero_()
    elif kind == "sparse":
        x *= torch.rand(length, generator=generator) < 0.05
    x = x.to(dtype)
    if kind == "denormal":
        x = torch.randint(-9, 10, (length,), generator=generator).to(dtype) * tiniest(dtype)
    if layout == "strided":
        wide = torch.full((length, 2), torch.nan, dtype=dtype)
        wide[:, 1] = x
        return wide[:, 1]
    if layout == "offset":
        # One number past an aligned address, with neighbours that must not be read.
        longer = torch.full((length + 2,), torch.nan, dtype=dtype)
        longer[1:-1] = x
        return longer[1:-1]
    return x


@dataclass
class Lists:
    """R vectors of T tensors, some None, and the scale that each vector was made at."""

    vectors: list[list[Tensor | None]]
    scales: list[float]
    lengths: list[int]

    def norm(self, vector: int, t: int) -> float:
        x = self.vectors[vector][t]
        return 0.0 if x is None else float(x.double().norm())


@st.composite
def lists(draw, least: int = 1, most: int = 4, dtypes: st.SearchStrategy[torch.dtype] = DTYPES) -> Lists:
    lengths = draw(st.lists(LENGTHS, min_size=1, max_size=5))
    if draw(st.booleans()):
        lengths = lengths + lengths[:1] * 3
    scales = [draw(SCALES) for _ in range(draw(st.integers(least, most)))]
    seed = draw(st.integers(0, 2**31))
    holes = draw(st.booleans())
    same = draw(st.none() | dtypes)
    vectors = []
    for r, scale in enumerate(scales):
        vector: list[Tensor | None] = []
        for t, length in enumerate(lengths):
            if holes and draw(st.integers(0, 3)) == 0:
                vector.append(None)
                continue
            dtype = same or draw(dtypes)
            # A half-precision number has no room for the larger scales.
            size = min(max(scale, 1e-3), 1e2) if dtype == torch.float16 else scale
            vector.append(tensor(length, dtype, size, draw(KINDS), draw(LAYOUTS), seed + 97 * r + t))
        vectors.append(vector)
    return Lists(vectors, scales, lengths)


def spoil(x: Tensor, position: int, value: float) -> None:
    x[position % len(x)] = value

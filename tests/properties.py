"""What must hold of tensors and lists of tensors, as assertions, and the flat float64 reading of a list."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference import equations

Gradients = Sequence[Tensor | None]

# How far one rounding to a dtype may move a number, relative to the largest vector that went into it.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def flat(gradients: Gradients, like: Sequence[Tensor]) -> Tensor:
    """One float64 vector; a missing gradient is zero."""
    parts = [
        torch.zeros(p.numel(), dtype=torch.float64) if x is None else x.detach().double().reshape(-1)
        for x, p in zip(gradients, like, strict=True)
    ]
    return torch.cat(parts)


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The opposite of :func:`flat`."""
    return [x.view(p.shape) for x, p in zip(vector.split([p.numel() for p in like]), like, strict=True)]


def expected(
    kinds: Sequence[Gradients],
    like: Sequence[Tensor],
    *,
    rule: str = "MDGD",
    align: float = 1.0,
    regularize: float = 1.0,
    masks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """d of "MDGD", (9) or under masks (11), or of "Project", parameter by parameter in the flat float64 forms."""
    out = []
    for t, p in enumerate(like):
        g, v, g0, v0 = (flat([gradients[t]], [p]) for gradients in kinds)
        mask = torch.ones_like(g) if masks is None else flat([masks[t]], [p])
        if rule == "Project":
            d = mask * equations.project(g, v, align)
        elif masks is None:
            d = equations.mdgd(g, v, g0, v0, align, regularize)
        else:
            d = equations.mdgd_gm(g, v, mask, align)
        out += split(d, [p])
    return out


def assert_close(actual: Gradients, wanted: Sequence[Tensor], inputs: Sequence[Gradients] = ()) -> None:
    """Equal to the rounding of each tensor's dtype, beside the largest of the inputs."""
    inputs = inputs or [wanted]
    scale = max(float(x.double().norm()) for kind in inputs for x in kind if x is not None)
    dtypes = {x.dtype for kind in (*inputs, actual) for x in kind if x is not None}
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    for i, (x, y) in enumerate(zip(actual, wanted, strict=True)):
        difference = (torch.zeros_like(y) if x is None else x.detach().double()) - y
        assert difference.abs().max() <= tolerance * scale, f"tensor {i}: {difference}"


def assert_near(actual: Gradients, wanted: Gradients) -> None:
    """Equal to the rounding of the dtype, tensor by tensor beside the largest number of all.

    For two ways to compute one thing: with and without a graph, compiled or not. A processor may have kernels of its
    own for each, and torch promises no equal bits.
    """
    assert [x is None for x in actual] == [x is None for x in wanted]
    assert_close([x for x in actual if x is not None], [x.detach().double() for x in wanted if x is not None])


def assert_same_bits(actual: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    """Equal bit for bit, the sign of zero and the payload of NaN included."""
    for i, (x, y) in enumerate(zip(actual, wanted, strict=True)):
        if x is None or y is None:
            assert x is y, f"tensor {i}: {x} and {y}"
            continue
        assert x.dtype == y.dtype
        assert torch.equal(bits(x), bits(y)), f"tensor {i}: {x} and {y}"


def bits(x: Tensor) -> Tensor:
    """The numbers of a tensor as integers of their width."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().reshape(-1).view(kind)


def assert_orthogonal(x: Tensor, v: Tensor, tolerance: float = 1e-13) -> None:
    """⟨x, v⟩ = 0 beside the lengths of the two."""
    x, v = x.double().reshape(-1), v.double().reshape(-1)
    assert abs(float(x @ v)) <= tolerance * float(x.norm() * v.norm() + torch.finfo(torch.float64).tiny)

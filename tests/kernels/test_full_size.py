"""At the block sizes that run outside of tests, which the other tests make small."""

import importlib.util

import pytest
import torch

from torch_mdgd import kernels
from torch_mdgd.kernels import oracle

NUMBERS = 3 << 20


@pytest.fixture(autouse=True, params=["eager", *(["compiled"] if importlib.util.find_spec("numba") else [])])
def backend(request):
    with kernels.use_backend(request.param):
        yield


@pytest.mark.parametrize("kind", ["equal", "offset", "heavy tails"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_sum_of_millions_of_numbers_keeps_its_digits(kind, dtype):
    x = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    x = {"equal": torch.full_like(x, 0.3), "offset": x + 1, "heavy tails": (2 * x).exp()}[kind].to(dtype)
    wanted = float(x.double() @ x.double())
    assert float(kernels.inner_products([[x]])) == pytest.approx(wanted, rel=3e-7)


def test_a_vector_without_its_component_is_orthogonal():
    g, v = (torch.randn(NUMBERS, generator=torch.Generator().manual_seed(s)) + 1 for s in (1, 2))
    products = kernels.inner_products([[g], [v]])[0]
    kernels.combine_([g], [[g], [v]], torch.stack([products.new_ones(()), -products[0, 1] / products[1, 1]])[None])
    left = float(kernels.inner_products([[g]], [[v]]))
    assert abs(left) <= 1e-6 * float(g.double().norm() * v.double().norm())


@pytest.mark.parametrize("fraction", [0.01, 0.5])
@pytest.mark.parametrize("kind", ["normal", "half zeros"])
def test_the_largest_of_millions(fraction, kind):
    x = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    parts = list((x if kind == "normal" else x.clamp(min=0)).split([NUMBERS - 5, 0, 5]))
    k = round(fraction * NUMBERS)
    got = kernels.top_k_masks(parts, k)
    assert all(torch.equal(a, b) for a, b in zip(got, oracle.top_k_masks(parts, k), strict=True))

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.cases import denormals_work, lists, spoil
from torch_mdgd import kernels
from torch_mdgd.kernels import oracle


def on(vector, device):
    return [None if x is None else x.to(device) for x in vector]


def coefficients(case, seed):
    """Such that every term is near one, and here and there zero, however far apart the scales of the vectors are."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(len(case.lengths), len(case.vectors), generator=generator, dtype=torch.float64)
    return c / torch.tensor(case.scales, dtype=torch.float64)


def assert_close(got, wanted, size):
    """One rounding to got's dtype, and float32 roundings of terms of the given size."""
    info = torch.finfo(got.dtype)
    got, wanted = got.cpu().double(), wanted.double()
    odd = ~wanted.isfinite()
    assert torch.equal(got[odd].nan_to_num(1, 2, 3), wanted[odd].nan_to_num(1, 2, 3))
    rounding = 1e-15 if info.dtype == "float64" else 4e-7
    smallest = info.smallest_normal * (info.eps if denormals_work(torch.bfloat16) or info.dtype != "bfloat16" else 1)
    bound = info.eps * wanted.abs() + rounding * size + 2 * smallest
    assert bool(((got - wanted).abs() <= bound)[~odd].all())


def sizes(case, c):
    out = []
    for t, length in enumerate(case.lengths):
        parts = [c[t, r].abs() * x[t].double().abs() for r, x in enumerate(case.vectors) if x[t] is not None]
        out.append(sum(parts, torch.zeros(length, dtype=torch.float64)))
    return out


def check(case, c, target, masks, device):
    """Compare a combination written over ``target`` (a vector's number; None: fresh tensors) with the oracle's."""
    fresh = [torch.full((n,), math.nan) for n in case.lengths]
    out = fresh if target is None else case.vectors[target]
    wanted = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in out]
    oracle.combine_(wanted, case.vectors, c, masks)
    limits = sizes(case, c)
    vectors = [on(vector, device) for vector in case.vectors]
    got = on(fresh, device) if target is None else vectors[target]
    kernels.combine_(got, vectors, c.to(device), None if masks is None else on(masks, device))
    for t, x in enumerate(got):
        if x is not None:
            assert_close(x, wanted[t], limits[t])


def test_what_is_its_own_sum_is_left_alone_and_nothing_else(backend, device):
    """Beside g, taken once and written over, v stands for one parameter and not for the other."""
    g, v = ([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.tensor([10.0, 20.0]), None])
    out, v = on(g, device), on(v, device)
    kernels.combine_(out, [out, v], torch.ones(2, 2, dtype=torch.float64, device=device))
    assert [x.tolist() for x in out] == [[11.0, 22.0], [3.0]]


@given(case=lists(), seed=st.integers(0, 99), into=st.none() | st.integers(0, 3))
def test_linear_combination(backend, device, case, seed, into):
    check(case, coefficients(case, seed), None if into is None else into % len(case.vectors), None, device)


@given(case=lists(), seed=st.integers(0, 99), density=st.sampled_from([0.0, 0.3, 1.0]), holes=st.booleans())
def test_masked(backend, device, case, seed, density, holes):
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(n, generator=generator) < density for n in case.lengths]
    if holes:
        masks[0] = None
    check(case, coefficients(case, seed), None, masks, device)


@given(
    case=lists(dtypes=st.sampled_from([torch.float32, torch.bfloat16])),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    at=st.data(),
    zero=st.booleans(),
    masked=st.booleans(),
)
def test_nan_and_inf_come_through(backend, device, case, value, at, zero, masked):
    present = [x for vector in case.vectors for x in vector if x is not None and len(x)]
    if not present:
        return
    spoil(at.draw(st.sampled_from(present)), at.draw(st.integers(0, 999)), value)
    c = coefficients(case, 0)
    if zero:
        c.zero_()
    masks = [torch.zeros(n, dtype=torch.bool) for n in case.lengths] if masked else None
    check(case, c, None, masks, device)


def test_nan_in_a_coefficient(backend, device):
    out = [torch.zeros(100, device=device)]
    kernels.combine_(out, [[torch.ones(100, device=device)]], torch.tensor([[math.nan]], device=device).double())
    assert bool(out[0].isnan().all())


@pytest.mark.parametrize(("x", "c"), [(1e-30, 1e42), (1e30, 1e-42), (1e-30, 3e30), (1e-36, 1e38), (1e30, 1.1e-39)])
def test_coefficients_that_float32_cannot_hold(backend, device, x, c):
    # A whole tile, and a part of one.
    out = [torch.zeros(129, device=device)]
    vector = [torch.full((129,), x, device=device)]
    kernels.combine_(out, [vector], torch.tensor([[c]], dtype=torch.float64, device=device))
    assert out[0].tolist() == pytest.approx([x * c] * 129, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(backend, device, dtype):
    if dtype == torch.bfloat16 and backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
    # 1 + eps / 2 is halfway between two numbers and would become the even one, 1; the third term decides.
    eps = torch.finfo(dtype).eps
    x = torch.ones(40, dtype=dtype, device=device)
    out = [torch.zeros_like(x)]
    c = torch.tensor([[1, eps / 2, 2.0**-20]], dtype=torch.float64, device=device)
    kernels.combine_(out, [[x], [x], [x]], c)
    assert bool((out[0] == 1 + eps).all())


def test_without_a_term_the_result_is_zero(backend, device):
    out = [torch.full((70,), math.nan, device=device), None]
    kernels.combine_(out, [[None, None]], torch.ones(2, 1, dtype=torch.float64, device=device))
    assert not out[0].any()
    assert out[1] is None


def test_neighbours_are_left_alone(backend, device):
    whole = torch.full((203,), 7.0, device=device)
    out = [whole[1:-1], whole.new_zeros(4)]
    kernels.combine_(
        out, [[torch.ones(201, device=device), None]], torch.ones(2, 1, dtype=torch.float64, device=device)
    )
    assert float(whole[0]) == float(whole[-1]) == 7
    assert bool((whole[1:-1] == 1).all())


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_writes_into_a_tensor_that_is_not_contiguous(backend, device, layout):
    base = torch.zeros(30, 20, device=device)
    out = base.t() if layout == "transposed" else base[:, ::2]
    x = torch.randn(out.shape, device=device)
    kernels.combine_([out], [[x]], torch.full((1, 1), 2.0, dtype=torch.float64, device=device))
    assert torch.equal(out, 2 * x)
    if layout == "strided":
        assert not base[:, 1::2].any()


def test_a_parameter_that_requires_grad_is_written_in_place(backend, device):
    p = torch.nn.Parameter(torch.ones(50, device=device))
    version = p._version
    kernels.combine_([p], [[p]], torch.full((1, 1), 3.0, dtype=torch.float64, device=device))
    assert bool((p == 3).all())
    assert p._version > version


@pytest.mark.parametrize("numel", [3, 5000])
def test_the_target_may_be_several_of_the_vectors(backend, device, numel):
    x = torch.randn(numel, device=device)
    wanted = 5 * x.double()
    kernels.combine_([x], [[x], [x]], torch.tensor([[2.0, 3.0]], dtype=torch.float64, device=device))
    torch.testing.assert_close(x.double(), wanted, rtol=1e-6, atol=0)

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.cases import LENGTHS, lists, spoil
from torch_mdgd import kernels
from torch_mdgd.kernels import oracle

# Of ‖x‖‖y‖. A float32 product is off by at most 2^-24, and a sum of few such sums by little more.
TOLERANCE = 2e-7


def on(vector, device):
    return [None if x is None else x.to(device) for x in vector]


def assert_close(got, wanted, rows, columns):
    """Within TOLERANCE of the product of the norms, or both NaN, or both the same infinity."""
    got = got.cpu()
    assert got.shape == wanted.shape
    assert got.dtype == torch.float64
    for t, r, c in torch.cartesian_prod(*(torch.arange(n) for n in wanted.shape)).view(-1, 3).tolist():
        x, y = rows[r][t], columns[c][t]
        if not wanted[t, r, c].isfinite():
            assert str(float(got[t, r, c])) == str(float(wanted[t, r, c]))
        elif x is None or y is None:
            assert got[t, r, c] == 0
        else:
            both = x.dtype == y.dtype == torch.float64
            bound = float(x.double().norm() * y.double().norm()) * (1e-14 if both else TOLERANCE)
            # float64 denormals have no digits to keep, and their norms underflow.
            assert abs(float(got[t, r, c] - wanted[t, r, c])) <= bound + 1e-300


@given(case=lists())
def test_every_pair_of_vectors(backend, device, case):
    vectors = [on(vector, device) for vector in case.vectors]
    assert_close(
        kernels.inner_products(vectors), oracle.inner_products(case.vectors, case.vectors), case.vectors, case.vectors
    )


@given(case=lists(least=2), split=st.integers(1, 3))
def test_rows_against_columns(backend, device, case, split):
    split = min(split, len(case.vectors) - 1)
    rows, columns = case.vectors[:split], case.vectors[max(0, split - 1) :]
    moved = [on(vector, device) for vector in case.vectors]
    got = kernels.inner_products(moved[:split], moved[max(0, split - 1) :])
    assert_close(got, oracle.inner_products(rows, columns), rows, columns)


@given(case=lists(dtypes=st.just(torch.float32)), value=st.sampled_from([math.nan, math.inf, -math.inf]), at=st.data())
def test_nan_and_inf_come_through(backend, device, case, value, at):
    present = [x for vector in case.vectors for x in vector if x is not None and len(x)]
    if not present:
        return
    spoil(at.draw(st.sampled_from(present)), at.draw(st.integers(0, 999)), value)
    vectors = [on(vector, device) for vector in case.vectors]
    assert_close(
        kernels.inner_products(vectors), oracle.inner_products(case.vectors, case.vectors), case.vectors, case.vectors
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e35])
@given(length=LENGTHS.filter(bool))
@settings(max_examples=8)
def test_products_that_float32_cannot_hold(backend, device, dtype, scale, length):
    x = torch.full((length,), scale, dtype=dtype, device=device)
    got = kernels.inner_products([[x]])
    assert float(got) == pytest.approx(length * float(x[0]) ** 2, rel=1e-6, abs=0)


def test_tiny_products_beside_large_ones(backend, device):
    x = torch.full((400,), 1e-25, device=device)
    y = x.clone()
    y[0] = 1e25
    got = kernels.inner_products([[x], [y]])[0].cpu()
    assert float(got[0, 0]) == pytest.approx(400e-50, rel=1e-6, abs=0)
    assert float(got[0, 1]) == pytest.approx(1 + 399e-50, rel=1e-6, abs=0)
    assert float(got[1, 1]) == pytest.approx(1e50, rel=1e-6, abs=0)


@pytest.mark.parametrize("value", [0.1, 2.0**-12.5])
def test_equal_numbers_do_not_pile_up_their_rounding(backend, device, value):
    # A running float32 sum of equal numbers is off in the fifth digit here; at the true block sizes it would be worse.
    x = torch.full((20_000,), value, device=device)
    wanted = 20_000 * float(x[0].double()) ** 2
    assert float(kernels.inner_products([[x]])) == pytest.approx(wanted, rel=3e-7, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_bits_every_time(backend, device, dtype):
    vectors = [[torch.randn(n, device=device).to(dtype) for n in (300, 3, 0, 130)] for _ in range(3)]
    first = kernels.inner_products(vectors)
    assert all(torch.equal(first, kernels.inner_products(vectors)) for _ in range(3))


@pytest.mark.parametrize("rows", [1, 11])
def test_more_vectors_than_one_launch_takes(backend, device, rows):
    generator = torch.Generator().manual_seed(0)
    vectors = [[torch.randn(n, generator=generator) for n in (70, 3)] for _ in range(11)]
    moved = [on(vector, device) for vector in vectors]
    got = kernels.inner_products(moved[:rows], moved)
    assert_close(got, oracle.inner_products(vectors[:rows], vectors), vectors[:rows], vectors)
    if rows == 11:
        assert_close(kernels.inner_products(moved), oracle.inner_products(vectors, vectors), vectors, vectors)


def test_symmetric(backend, device):
    vectors = [[torch.randn(n, device=device) for n in (300, 5)] for _ in range(3)]
    table = kernels.inner_products(vectors)
    assert torch.equal(table, table.mT)


def test_shapes_of_any_dimension_and_parameters_that_require_grad(backend, device):
    x = torch.nn.Parameter(torch.randn(3, 4, 5, device=device))
    y = torch.randn(5, 4, 3, device=device).permute(2, 1, 0)
    got = kernels.inner_products([[x]], [[y]])
    assert not got.requires_grad
    assert float(got) == pytest.approx(float((x.detach().double() * y.double()).sum()), rel=1e-5, abs=0)


def test_no_parameters_and_no_tensors(backend):
    assert kernels.inner_products([[], []]).shape == (0, 2, 2)
    assert torch.equal(kernels.inner_products([[None]]), torch.zeros(1, 1, 1, dtype=torch.float64))


def test_small_tensors_of_one_size_on_two_devices():
    """Told by tensors of a GPU that hold no numbers."""
    with FakeTensorMode(), kernels.use_backend("eager"):
        row = [torch.zeros(3, device=device) for device in ("cpu", "cuda")]
        table = kernels.inner_products([row, row])
    assert table.shape == (2, 2, 2)
    assert table.device.type == "cpu"

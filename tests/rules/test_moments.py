"""Second moments in their low-rank form, against those at full size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_mdgd.rules.moments import SAMPLE, Moments


def inputs(n, width, seed, energy=0.3):
    """Of few strong directions among many weak ones."""
    generator = torch.Generator().manual_seed(seed)
    strength = energy ** torch.arange(width, dtype=torch.float64)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) * strength


def dense(covariance, width):
    eye = torch.eye(width, dtype=torch.float64)
    (out,) = covariance.after([eye])
    return out


def of(x, rank, width=None):
    return Moments.of(x, width or x.shape[1], rank, x.new_zeros(1))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99), st.booleans())
def test_whole_moments_of_parts_are_those_of_all(n, width, seed, bias):
    x = inputs(n, width, seed, 0.8)
    cut = n // 2
    found = of(x[:cut], None, width + bias).plus([of(x[cut:], None, width + bias)])
    whole = torch.cat([x, x.new_ones(n, 1)], 1) if bias else x
    assert torch.allclose(found.sums, whole.T @ whole, rtol=1e-12, atol=1e-12)
    C = whole.T @ whole / n
    assert torch.allclose(dense(found.covariance(), width + bias), C / C.diagonal().mean(), rtol=1e-10, atol=1e-10)
    size = torch.tensor(3.0, dtype=torch.float64)
    assert torch.allclose(dense(found.covariance(size), width + bias), C / 3, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_left_out(rank, bad):
    held, x = of(inputs(9, 4, 0), rank), inputs(9, 4, 1)
    x[3, 2] = bad
    after = held.plus([of(x, rank)])
    assert torch.equal(after.sums, held.sums)
    assert torch.equal(after.size, held.size)


@given(st.integers(1, 4), st.integers(6, 10), st.integers(0, 99))
def test_one_batch_gives_the_top_directions_and_the_rest(rank, width, seed):
    x = inputs(60, width, seed, 0.7)
    found = dense(of(x, rank).covariance(torch.ones((), dtype=torch.float64)), width)
    C = x.T @ x / len(x)
    values, vectors = torch.linalg.eigh(C)
    rest = values[:-rank].mean()
    wanted = (vectors * torch.cat([rest.expand(width - rank), values[-rank:]])) @ vectors.T
    assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10)
    assert torch.allclose(found.trace(), C.trace())


@given(st.integers(1, 6), st.integers(0, 99))
def test_no_fewer_directions_than_there_are_lose_nothing(width, seed):
    x = inputs(30, width, seed)
    found = dense(of(x[:10], 8).plus([of(x[10:], 8)]).covariance(), width)
    C = x.T @ x / 30
    assert torch.allclose(found, C / C.diagonal().mean(), rtol=1e-9, atol=1e-9)


def test_batches_in_turn_keep_the_strong_directions():
    x = inputs(400, 20, 0)
    total = of(x[:40], 3)
    for start in range(40, 400, 40):
        total = total.plus([of(x[start : start + 40], 3)])
    C = x.T @ x / 400
    found = dense(total.covariance(torch.ones((), dtype=torch.float64)), 20)
    values, vectors = torch.linalg.eigh(C)
    for i in (-1, -2, -3):
        along = vectors[:, i] @ found @ vectors[:, i]
        assert abs(along / values[i] - 1) < 0.02


def test_of_many_inputs_some_are_decomposed_and_all_counted():
    x = inputs(3 * SAMPLE, 5, 1)
    moments = of(x, 4)
    assert moments.size.tolist() == [float(x.square().sum()), 3 * SAMPLE]
    C = x.T @ x / len(x)
    found = dense(moments.covariance(torch.ones((), dtype=torch.float64)), 5)
    assert (found - C).norm() < 0.2 * C.norm()


def test_nothing_and_what_is_not_finite():
    empty = Moments.empty(4, 2, torch.zeros(1, dtype=torch.float64))
    assert not dense_any(empty)
    x = inputs(5, 4, 0)
    x[2, 1] = float("inf")
    held = of(inputs(5, 4, 1), 2)
    assert held.plus([of(x, None)]) is held
    assert not dense_any(of(x[:0], 2))


def dense_any(moments):
    return bool(dense(moments.covariance(), 4).any())

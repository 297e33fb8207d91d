import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.cases import LAYOUTS, LENGTHS, lists, spoil, tensor, tiniest
from torch_mdgd import kernels
from torch_mdgd.kernels import oracle, selection

KINDS = ["normal", "equal", "few", "sorted", "reversed", "infinite", "zeros", "tiny", "one of a kind"]


def scores(lengths, kind, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    if kind == "equal":
        x = torch.full_like(x, -3.0)
    elif kind == "few":
        x = torch.randint(0, 3, (n,), generator=generator).double()
    elif kind == "sorted":
        x = x.sort().values
    elif kind == "reversed":
        x = x.sort(descending=True).values
    elif kind == "infinite":
        x = x.sign() * math.inf
    elif kind == "zeros":
        x = torch.where(x > 0.7, x, torch.where(x > 0, 0.0, -0.0))
    elif kind == "tiny":
        x = torch.randint(-50, 50, (n,), generator=generator) * tiniest(dtype)
    elif kind == "one of a kind":
        x = torch.zeros_like(x)
        x[:1] = 1
    parts = []
    for part in x.to(dtype).split(lengths):
        held = tensor(len(part), dtype, 1.0, "zeros", layout, 0)
        held.copy_(part)
        parts.append(held)
    return parts


def assert_same(got, wanted, k):
    assert sum(int(m.sum()) for m in got if m is not None) == k
    for t, (mask, right) in enumerate(zip(got, wanted, strict=True)):
        assert (mask is None) == (right is None)
        if mask is not None:
            assert mask.dtype == torch.bool
            assert torch.equal(mask.cpu(), right), t


@pytest.mark.parametrize("kind", KINDS)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=6).filter(sum),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    layout=LAYOUTS,
    seed=st.integers(0, 99),
    fraction=st.floats(0, 1),
)
def test_as_the_oracle_chooses(backend, device, kind, lengths, dtype, layout, seed, fraction):
    parts = scores(lengths, kind, dtype, layout, seed)
    k = max(1, round(fraction * sum(lengths)))
    got = kernels.top_k_masks([x.to(device) for x in parts], k)
    assert_same(got, oracle.top_k_masks(parts, k), k)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_a_long_list(backend, device, fraction):
    parts = [
        torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in [(60, 20), (7,), (1, 1), (300,)]
    ]
    k = round(fraction * 1508)
    assert_same(kernels.top_k_masks([x.to(device) for x in parts], k), oracle.top_k_masks(parts, k), k)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, torch.int32), (torch.float64, torch.int64)])
def test_numbers_that_differ_in_their_last_bit(backend, device, dtype, bits, sign):
    one = torch.tensor(1.0, dtype=dtype).view(bits)
    steps = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    x = sign * (one + steps.to(bits)).view(dtype)
    for k in (1, 2, 3, 50):
        assert_same(kernels.top_k_masks([x.to(device)], k), oracle.top_k_masks([x], k), k)


def test_every_k_beside_the_edges_of_a_bracket(monkeypatch):
    """Such as one number below the edge, where a count that is off by one would leave a mask one short."""
    monkeypatch.setattr(selection, "SAMPLE", 16)
    monkeypatch.setattr(selection, "SPREAD", 0.02)
    generator = torch.Generator().manual_seed(5)
    with kernels.use_backend("eager"):
        for _ in range(20):
            x = torch.randperm(60, generator=generator).float()
            for k in range(1, 61):
                (mask,) = kernels.top_k_masks([x], k)
                assert torch.equal(mask, x >= 60 - k), k


@pytest.mark.parametrize("k", [1, 2, 150, 500, 999, 1000])
def test_a_sample_that_misleads_costs_time_and_nothing_else(backend, device, k, monkeypatch):
    # A bracket far narrower than the sample can promise, so that the k-th largest is mostly outside.
    monkeypatch.setattr(selection, "SAMPLE", 16)
    monkeypatch.setattr(selection, "SPREAD", 0.02)
    x = torch.randn(1000, generator=torch.Generator().manual_seed(3)).exp()
    assert_same(kernels.top_k_masks([x.to(device)], k), oracle.top_k_masks([x], k), k)


def test_mixed_dtypes_compare_as_numbers(backend, device):
    parts = [torch.randn(100, generator=torch.Generator().manual_seed(d)) for d in range(4)]
    parts = [x.to(d) for x, d in zip(parts, [torch.float32, torch.bfloat16, torch.float64, torch.float16], strict=True)]
    assert_same(kernels.top_k_masks([x.to(device) for x in parts], 57), oracle.top_k_masks(parts, 57), 57)


@pytest.mark.parametrize("length", [3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_is_refused_by_the_name_of_its_tensor(backend, device, length, dtype):
    parts = [torch.zeros(length, dtype=dtype, device=device) for _ in range(3)]
    parts[1][length // 2] = math.nan
    with pytest.raises(ValueError, match=r"scores\[1\].*NaN"):
        kernels.top_k_masks(parts, 2)


@pytest.mark.parametrize("k", [-1, 0, 201])
def test_k_out_of_range_is_refused(backend, device, k):
    with pytest.raises(ValueError, match=f"k must be .*{k}"):
        kernels.top_k_masks([torch.zeros(100, device=device), torch.zeros(100, device=device)], k)


@given(case=lists(least=3, most=3), seed=st.integers(0, 99), fraction=st.floats(0, 1), plain=st.booleans())
def test_similarity(backend, device, case, seed, fraction, plain):
    g, v, g0 = case.vectors
    count = sum(n for n, *xs in zip(case.lengths, g, v, g0, strict=True) if any(x is not None for x in xs))
    if not count:
        return
    k = max(1, round(fraction * count))
    a = None
    if not plain:
        ratio = case.scales[0] / case.scales[1]
        a = torch.randn(len(g), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * ratio
    moved = [[None if x is None else x.to(device) for x in vector] for vector in case.vectors]
    got = kernels.top_k_similarity_masks(*moved, None if a is None else a.to(device), k)
    assert_same(got, oracle.top_k_similarity_masks(g, v, g0, a, k), k)


def test_similarities_that_float32_cannot_hold_keep_their_order(backend, device):
    g = torch.linspace(1, 2, 500) * 1e-30
    g0 = torch.full((500,), 1e-30)
    none = [None]
    (mask,) = kernels.top_k_similarity_masks([g.to(device)], none, [g0.to(device)], None, 50)
    assert mask.nonzero().flatten().tolist() == list(range(450, 500))


def test_a_nan_similarity_is_refused_by_the_number_of_its_parameter(backend, device):
    g = [None, torch.ones(200), torch.ones(300)]
    g0 = [None, torch.ones(200), torch.ones(300)]
    spoil(g0[2], 290, math.nan)
    moved = [[None if x is None else x.to(device) for x in vector] for vector in (g, g0)]
    with pytest.raises(ValueError, match=r"parameter 2.*NaN"):
        kernels.top_k_similarity_masks(moved[0], [None] * 3, moved[1], None, 5)

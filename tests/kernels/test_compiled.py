"""What is the compiled backend's alone: when it is taken, its threads, and its cache on disk."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_mdgd import kernels
from torch_mdgd.kernels import dispatch

LARGE, EACH = dispatch.LARGE, dispatch.EACH


@pytest.fixture
def compiled():
    pytest.importorskip("numba")
    from torch_mdgd.kernels import compiled

    return compiled


@pytest.fixture
def fails(monkeypatch):
    """As where numba is installed and does not work."""

    def fail():
        raise ImportError("Numba needs NumPy 1.0 or less\nand more")

    dispatch._compiles.cache_clear()
    monkeypatch.setattr(dispatch, "_installed", lambda name: name == "numba")
    monkeypatch.setattr(dispatch, "_compiled", fail)
    yield
    dispatch._compiles.cache_clear()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scratch_begins_at_a_cache_line(compiled, dtype):
    held = [compiled.chunks.scratch(rows, dtype) for rows in range(1, 30)]
    assert {x.ctypes.data % 64 for x in held} == {0}
    assert [x.shape for x in held] == [(rows, compiled.chunks.CHUNK) for rows in range(1, 30)]
    assert {x.dtype for x in held} == {np.dtype(dtype)}


def test_large_lists_on_the_cpu_are_taken(compiled):
    assert kernels.backend_for([torch.zeros(LARGE)]) == "compiled"
    assert kernels.backend_for([None, *[torch.zeros(LARGE // 2)] * 2]) == "compiled"
    half = LARGE // 2 - EACH
    assert kernels.backend_for([torch.zeros(half), None, torch.zeros(half)]) == "compiled"
    assert kernels.backend_for([torch.zeros(half), None, torch.zeros(half - 1)]) == "eager"
    assert kernels.backend_for([torch.zeros(1)] * (LARGE // EACH)) == "compiled"
    assert kernels.backend_for([torch.zeros(LARGE, device="meta")]) == "eager"
    assert kernels.backend_for([torch.nn.Parameter(torch.zeros(LARGE))]) == "compiled"


def test_a_numba_that_fails_is_told_once_and_left_out(fails):
    with pytest.warns(UserWarning, match=r"numba failed \(Numba needs NumPy 1.0 or less\)$"):
        assert kernels.backend_for([torch.zeros(LARGE)]) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.backend_for([torch.zeros(LARGE)]) == "eager"
        assert float(kernels.inner_products([[torch.ones(LARGE)]])) == LARGE


def test_without_numba_nothing_is_said(monkeypatch):
    dispatch._compiles.cache_clear()
    monkeypatch.setattr(dispatch, "_installed", lambda name: False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kernels.backend_for([torch.zeros(LARGE)]) == "eager"
    finally:
        dispatch._compiles.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_on_any_number_of_threads(compiled, monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    vectors = [[torch.randn(n, generator=generator).to(dtype) for n in (LARGE, 1000, 77_777)] for _ in range(3)]
    c = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = [x.clone() for x in vectors[0]]
        with kernels.use_backend("compiled"):
            products = kernels.inner_products(vectors)
            kernels.combine_(out, [out, *vectors[1:]], c)
            masks = kernels.top_k_similarity_masks(*vectors, c[0], 40_000)
        found.append([products, *out, *masks])
    assert all(torch.equal(x, y) for others in found[1:] for x, y in zip(found[0], others, strict=True))


def test_what_was_compiled_is_kept_on_disk(compiled):
    from torch_mdgd.kernels.compiled import kernels as functions

    for function in (functions.products, functions.combine, functions.between, functions.ties):
        folder = Path(function.stats.cache_path)
        name = function.py_func.__name__
        assert list(folder.glob(f"*.{name}-*.nbi")), name
        assert list(folder.glob(f"*.{name}-*.nbc")), name


def test_a_multiple_of_itself_costs_nothing_and_does_nothing(compiled):
    x = torch.full((LARGE,), 3.0)
    version = x._version
    kernels.combine_([x], [[x], [None]], torch.tensor([[1.0, 5.0]], dtype=torch.float64))
    assert x._version == version
    assert bool((x == 3).all())

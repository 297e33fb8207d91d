"""What is measured as memory, against sizes known beforehand and against the computed table."""

import gc
from dataclasses import replace

import pytest
import torch

from benchmarks import allocation
from benchmarks.memory import computed, measure
from benchmarks.methods import METHODS, Method
from benchmarks.settings import QUICK

# Wide enough that blocks of scratch and the scalars of each tensor are small beside the gradients.
SETTINGS = replace(QUICK, hidden=128, layers=1)


def test_storages_count_views_once() -> None:
    x = torch.zeros(100)
    assert sum(allocation.storages([x, x[:10], x.view(10, 10), None, torch.zeros(3)]).values()) == 400 + 12


def test_storages_tell_meta_tensors_apart() -> None:
    sizes = allocation.storages(torch.empty(n, device="meta") for n in (10, 20, 30))
    assert sorted(sizes.values()) == [40, 80, 120]


def test_live_finds_fresh_tensors_and_their_gradients() -> None:
    old = torch.zeros(1000)
    with allocation.fresh():
        new = {"deep": [torch.zeros(1000, requires_grad=True)]}
        new["deep"][0].sum().backward()
        assert sorted(allocation.storages(allocation.live()).values()) == [4000, 4000]
    assert len(old) == 1000


def test_what_was_frozen_stays_so() -> None:
    """Or the rest of the tests collects garbage among all that was imported."""
    gc.freeze()
    with allocation.fresh():
        pass
    assert gc.get_freeze_count()


def test_peak_counts_temporaries() -> None:
    x = torch.zeros(1 << 16)
    size = x.nbytes
    assert size <= allocation.peak(lambda: x + 1) < 1.1 * size
    assert 3 * size <= allocation.peak(lambda: (x + 1) + (x + 2)) < 3.1 * size
    assert allocation.peak(lambda: x.add_(1)) < 0.1 * size


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_measured_bytes_are_those_computed(method: Method) -> None:
    if not method.installed:
        pytest.skip("peft: not installed")
    from benchmarks.language_model import build

    shapes = [tuple(p.shape) for p in build(METHODS[0], SETTINGS).model.parameters()]
    found, expected = measure(method, SETTINGS), computed(method, shapes)
    # An adapter's rank is a whole number, so that it trains 10 % only roughly.
    tolerance = 0.05 if method.adapter is None else 0.15
    scale = expected.state
    for name, value in vars(expected).items():
        assert getattr(found.held, name) == pytest.approx(value, rel=tolerance, abs=0.01 * scale), name
    assert found.update >= found.held.gradients
    assert found.later >= found.held.parameters + found.held.gradients + found.held.extra

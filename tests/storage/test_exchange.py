"""The value exchange with the reference: θ comes back bit for bit, whatever happens inside."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.properties import assert_same_bits
from torch_mdgd import MDGD, MDGDOptimizer, Random
from torch_mdgd.storage import exchange
from torch_mdgd.storage.base import snapshot
from torch_mdgd.storage.exchange import exchange_


def model_with_awkward_numbers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3).bfloat16(), nn.Linear(3, 2).double())
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([-0.0, math.nan, math.inf, 1e-45])
        model[1].weight[0, 0] = -0.0
    return model


def copies(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def moved(model: nn.Module) -> MDGDOptimizer:
    """A wrapper whose parameters have left the reference."""
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7).add_(0.3)
        model[0].weight[1] = torch.tensor([-0.0, math.nan, -math.inf, 1e-45])
    return optimizer


def test_reference_holds_the_values_that_were_wrapped_and_gives_back_the_current_ones():
    model = model_with_awkward_numbers()
    start = copies(model)
    optimizer = moved(model)
    now = copies(model)
    for _ in range(2):
        with optimizer.reference():
            assert_same_bits(list(model.parameters()), start)
        assert_same_bits(list(model.parameters()), now)


def test_parameters_come_back_after_an_exception():
    model = model_with_awkward_numbers()
    optimizer = moved(model)
    now = copies(model)
    with pytest.raises(ZeroDivisionError), optimizer.reference():
        raise ZeroDivisionError
    assert_same_bits(list(model.parameters()), now)
    with optimizer.reference():
        pass


def test_parameters_come_back_after_an_exception_inside_a_capture():
    model = model_with_awkward_numbers()
    optimizer = moved(model)
    now = copies(model)
    with pytest.raises(ZeroDivisionError), optimizer.reference(), optimizer.capture("task"):
        raise ZeroDivisionError
    assert_same_bits(list(model.parameters()), now)


def test_parameters_stay_the_same_tensors():
    model = model_with_awkward_numbers()
    optimizer = moved(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    with optimizer.reference():
        assert [p.data_ptr() for p in model.parameters()] == addresses


def test_backward_across_the_exchange_is_refused_by_autograd():
    layer = nn.Linear(3, 3)
    optimizer = MDGDOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1))
    loss = layer(layer(torch.ones(1, 3))).sum()
    with optimizer.reference():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_places_are_swapped_and_no_number_moves():
    model = model_with_awkward_numbers()
    start = copies(model)
    optimizer = moved(model)
    now, addresses = copies(model), [p.data_ptr() for p in model.parameters()]
    held = [x.data_ptr() for x in optimizer._storage.reference]
    for error in (False, True):
        with pytest.raises(ZeroDivisionError) if error else nullcontext(), optimizer.reference(places=True):
            assert_same_bits(list(model.parameters()), start)
            assert [p.data_ptr() for p in model.parameters()] == held
            assert 1 / (not error)
        assert_same_bits(list(model.parameters()), now)
        assert [p.data_ptr() for p in model.parameters()] == addresses


def test_places_with_company_keep_their_addresses():
    """Whoever holds the buffer, or another view of it, sees φ too."""
    buffer = torch.arange(8.0)
    p, alone = nn.Parameter(buffer[2:5]), nn.Parameter(torch.zeros(2))
    optimizer = MDGDOptimizer(torch.optim.SGD([p, alone], lr=0.1))
    optimizer.set_reference([torch.full((3,), -1.0), torch.ones(2)])
    address = p.data_ptr()
    with optimizer.reference(places=True):
        assert buffer.tolist() == [0, 1, -1, -1, -1, 5, 6, 7]
        assert alone.tolist() == [1, 1]
        assert p.data_ptr() == address
    assert buffer.tolist() == list(range(8))
    assert alone.tolist() == [0, 0]


@pytest.mark.parametrize("places", [False, True])
def test_backward_across_an_exchange_is_refused_in_both_ways(places):
    layer = nn.Linear(3, 3)
    optimizer = MDGDOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1))
    with optimizer.reference(places=places):
        loss = layer(layer(torch.ones(1, 3))).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_exchange_keeps_memory_formats():
    p, x = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    a, b = p.clone(), x.clone()
    exchange_([p], [x])
    assert_same_bits([p, x], [b, a])


@pytest.mark.parametrize("other", [torch.ones(2), torch.ones(3, dtype=torch.bfloat16)])
def test_exchange_checks_everything_before_it_moves_anything(other):
    # A cast would round θ on its way back.
    good, bad = torch.zeros(3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"parameter 1 is torch\.float32, shape"):
        exchange_([good, bad], [torch.ones(3), other])
    assert_same_bits([good], [torch.zeros(3)])


def test_casting_the_model_after_wrapping_is_refused():
    layer = nn.Linear(3, 3).bfloat16()
    optimizer = MDGDOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1))
    layer.float()
    with pytest.raises(ValueError, match="wrap the optimizer last"):
        optimizer.reference().__enter__()
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("compact", [False, True])
def test_parameters_come_back_where_there_was_no_memory_to_exchange_all(compact, monkeypatch):
    monkeypatch.setattr(exchange, "PIECE", 6)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    start = copies(model)
    mask = {"mask": Random(0.5), "compact": True} if compact else {}
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), MDGD(regularize=0), **mask)
    ones = [torch.ones_like(p) for p in model.parameters()]
    optimizer.set_gradients(task=ones, visual=ones)
    optimizer.step()
    optimizer.zero_grad()
    now = copies(model)
    verb, calls = "take" if compact else "clone", []
    original = getattr(torch.Tensor, verb)

    def fails_once(x, *args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return original(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, verb, fails_once)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.reference().__enter__()
    assert_same_bits(list(model.parameters()), now)
    with optimizer.reference():
        assert_same_bits(list(model.parameters()), start)
    assert_same_bits(list(model.parameters()), now)


@pytest.mark.parametrize("compact", [False, True])
def test_the_reference_and_the_mask_follow_a_model_that_is_moved_after_it_was_wrapped(compact):
    # "meta" stands for a device other than the CPU.
    layer = nn.Linear(3, 3)
    optimizer = MDGDOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), mask=Random(0.5), compact=compact)
    optimizer.param_groups[0]["params"] = list(nn.Linear(3, 3, device="meta").parameters())
    with optimizer.reference():
        pass
    held = [x for entry in optimizer.state_dict()["state"].values() for x in entry.values()]
    assert len(held) == 4
    assert all(x.device.type == "meta" for x in held)


def test_two_parameters_in_one_memory_are_refused():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    MDGDOptimizer(torch.optim.SGD(tied.parameters(), lr=0.1))
    # As torch leaves it: two parameters, and the optimizer's step is made twice on the same numbers.
    tied.load_state_dict(tied.state_dict(), assign=True)
    assert tied[1].weight is not tied[0].weight
    with pytest.raises(ValueError, match="parameters 0 and 2 share memory"):
        MDGDOptimizer(torch.optim.SGD(tied.parameters(), lr=0.1))
    tied[1].weight.requires_grad_(False)
    MDGDOptimizer(torch.optim.SGD(tied.parameters(), lr=0.1))


def test_snapshot_is_a_copy_without_graph():
    p = nn.Parameter(torch.ones(3))
    copy = snapshot(p)
    with torch.no_grad():
        p.add_(1)
    assert copy.tolist() == [1.0, 1.0, 1.0]
    assert not copy.requires_grad

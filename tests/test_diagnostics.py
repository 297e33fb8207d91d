"""Effective rank and the angles between gradients; neither costs the training path anything."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.properties import flat
from tests.reference import equations
from tests.strategies import cases, make_case
from torch_mdgd import MDGDOptimizer, Project, Random, StepProject, TopK, effective_rank

F64 = (torch.float64,)


@pytest.mark.parametrize(
    ("singular_values", "wanted"),
    [
        ([1.0, 1.0, 1.0, 1.0], 4.0),
        ([3.0, 0.0, 0.0], 1.0),
        # p = 3/4, 1/4.
        ([3.0, 1.0, 0.0], (4 / 3) ** 0.75 * 4**0.25),
    ],
)
def test_effective_rank_by_hand(singular_values, wanted):
    assert effective_rank(torch.diag(torch.tensor(singular_values))) == pytest.approx(wanted, rel=1e-12)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_effective_rank_is_bounded_and_knows_neither_scale_nor_direction(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(m, n, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))[0]
    rank = effective_rank(Z)
    assert 1 - 1e-12 <= rank <= min(m, n) + 1e-12
    assert effective_rank(-7 * Q @ Z) == pytest.approx(rank, rel=1e-9)
    assert effective_rank(Z.T) == pytest.approx(rank, rel=1e-9)


def test_effective_rank_of_low_precision_with_a_graph():
    Z = torch.eye(3, dtype=torch.bfloat16, requires_grad=True)
    assert effective_rank(Z) == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize(
    ("Z", "message"),
    [
        (torch.zeros(3, 2), "all zero"),
        (torch.ones(3), r"must be a matrix of features \(tokens, channels\), got \(3,\)"),
        (torch.ones(0, 4), r"got \(0, 4\)"),
        (torch.tensor([[1.0, math.nan]]), "NaN or Inf"),
        (torch.tensor([[1.0, math.inf]]), "NaN or Inf"),
    ],
)
def test_effective_rank_refuses(Z, message):
    with pytest.raises(ValueError, match=message):
        effective_rank(Z)


def cosine(x, y):
    return float(x @ y / (x.norm() * y.norm()))


@given(cases(F64, missing=False))
def test_angles_and_lengths(case):
    like = case.parameters
    optimizer = MDGDOptimizer(torch.optim.SGD(like, lr=0.1))
    optimizer.set_gradients(**case.gradients)
    optimizer.combine()

    parts = [[x.reshape(-1) for x in row] for row in zip(*case.kinds, strict=True)]
    g_tilde = torch.cat([equations.decouple(g, v) for g, v, _, _ in parts])
    g0_tilde = torch.cat([equations.decouple(g0, v0) for _, _, g0, v0 in parts])
    r = torch.cat(
        [equations.regularizer(equations.decouple(g, v), equations.decouple(g0, v0)) for g, v, g0, v0 in parts]
    )
    g, v = (flat(kind, like) for kind in case.kinds[:2])

    found = optimizer.diagnostics
    assert found["cos_task_visual"] == pytest.approx(cosine(g, v), abs=1e-9)
    assert found["visual_to_task"] == pytest.approx(float(v.norm() / g.norm()), rel=1e-9)
    if g_tilde.norm() > 1e-3 * g.norm() and g0_tilde.norm() > 1e-3:
        assert found["cos_task_reference"] == pytest.approx(cosine(g_tilde, g0_tilde), abs=1e-6)
        assert found["regularizer_to_task"] == pytest.approx(float(r.norm() / g.norm()), abs=1e-6)
    assert "kept_fraction" not in found


def test_nothing_before_the_first_combine_and_no_reference_without_one():
    case = make_case([(3,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), Project())
    assert optimizer.diagnostics == {}
    optimizer.set_gradients(task=case.gradients["task"], visual=case.gradients["visual"])
    optimizer.combine()
    assert set(optimizer.diagnostics) == {"cos_task_visual", "visual_to_task"}


def test_without_a_visual_gradient_there_is_no_angle_to_it():
    case = make_case([(3,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1))
    optimizer.set_gradients(task=case.gradients["task"], visual=[None])
    optimizer.combine()
    assert optimizer.diagnostics == {}


@pytest.mark.parametrize("compact", [False, True])
def test_the_kept_fraction_is_of_trained_elements(compact):
    frozen, p = torch.nn.Parameter(torch.ones(30), requires_grad=False), torch.nn.Parameter(torch.ones(10))
    base = torch.optim.SGD([frozen, p], lr=0.1)
    assert MDGDOptimizer(base, mask=Random(0.3), compact=compact).diagnostics == {"kept_fraction": 0.3}


def test_zero_vectors_have_no_angle_and_no_nan():
    case = make_case([(3,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1))
    zero = [torch.zeros(3, dtype=torch.float64)]
    optimizer.set_gradients(task=zero, visual=zero, reference_task=zero, reference_visual=zero)
    optimizer.combine()
    assert set(optimizer.diagnostics.values()) == {0.0}


def test_recorded_values_are_shown():
    optimizer = MDGDOptimizer(torch.optim.SGD(make_case([(3,)], F64, 0).parameters, lr=0.1))
    x = torch.tensor(2.5, requires_grad=True)
    optimizer.record(visual_loss=x * 2)
    optimizer.record(other=torch.tensor(1))
    assert optimizer.diagnostics == {"visual_loss": 5.0, "other": 1.0}


def test_recording_keeps_no_graph_alive():
    optimizer = MDGDOptimizer(torch.optim.SGD(make_case([(3,)], F64, 0).parameters, lr=0.1))
    saved_for_backward = torch.ones(3, requires_grad=True) * 2
    optimizer.record(visual_loss=saved_for_backward.square().sum())
    storage = StorageWeakRef(saved_for_backward.untyped_storage())
    del saved_for_backward
    assert storage.expired()


class NoReads(TorchDispatchMode):
    """Fails where a number is read from a tensor: on a device, that waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = any(name in func.name() for name in ("_local_scalar_dense", "nonzero"))
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rule": Project()},
        {"mask": TopK(0.5)},
        {"rule": StepProject(0.1)},
        {"rule": StepProject(), "mask": TopK(0.5)},
        {"rule": Project(), "mask": TopK(0.5, refresh=9)},
    ],
)
def test_no_step_waits_for_the_device(settings, monkeypatch):
    case = make_case([(3, 4), (5,)], F64 * 2, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1, momentum=0.9), **settings)
    # The first step may: it chooses the mask.
    optimizer.set_gradients(**case.gradients)
    optimizer.step()
    optimizer.zero_grad()
    # It reads the rule's weights, which are on the CPU in any case.
    needs = optimizer.needs()
    monkeypatch.setattr(optimizer, "needs", lambda pictures: needs)
    with NoReads():
        optimizer.set_gradients(**case.gradients)
        optimizer.combine()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.diagnostics["visual_to_task"] > 0

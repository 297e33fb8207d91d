"""StepProject: the move of the wrapped optimizer, against the flat float64 form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import assert_close, assert_same_bits, flat, split
from tests.reference.equations import step_project
from tests.strategies import cases, make_case
from torch_mdgd import MDGDOptimizer, StepProject, TopK

F64 = (torch.float64,)
BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
}


def copies(tensors):
    return [torch.nn.Parameter(x.detach().clone()) for x in tensors]


def wrap(parameters, base="adamw", restore=0.0, mask=None):
    return MDGDOptimizer(BASES[base](parameters), StepProject(restore), mask=mask)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_step_project_by_hand():
    # ⟨Δ, v⟩ = 1 > 0 is removed; what is left has length √2 and the restoring move half of ‖Δ‖ = √5 along −v.
    delta, v = vector(2.0, -1.0), vector(1.0, 1.0)
    assert step_project(delta, v).tolist() == [1.5, -1.5]
    wanted = vector(1.5, -1.5) - 0.5 * math.sqrt(5) / math.sqrt(2)
    assert torch.allclose(step_project(delta, v, 0.5), wanted, rtol=1e-15)


def test_a_move_that_lowers_the_visual_loss_stays():
    delta, v = vector(2.0, -3.0), vector(1.0, 1.0)
    assert step_project(delta, v).tolist() == delta.tolist()


def test_no_visual_gradient_or_no_move_removes_and_restores_nothing():
    zero, x = vector(0.0, 0.0), vector(1.0, 2.0)
    assert step_project(x, zero, 0.5).tolist() == x.tolist()
    assert step_project(zero, x, 0.5).tolist() == [0.0, 0.0]


def expected_moves(moves, v, restore):
    return [split(step_project(flat([d], [d]), flat([x], [d]), restore), [d])[0] for d, x in zip(moves, v, strict=True)]


def masked(tensors, masks):
    return tensors if masks is None else [x * m for x, m in zip(tensors, masks, strict=True)]


@given(
    cases((torch.float64, torch.float32), missing=False),
    st.sampled_from(list(BASES)),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([None, TopK(0.4)]),
)
def test_every_step_equals_the_oracle(case, base, restore, mask):
    twins = copies(case.parameters)
    optimizer = wrap(case.parameters, base, restore, mask)
    plain = BASES[base](twins)
    for sign in (1, -1, 1):
        before = [p.detach().clone() for p in case.parameters]
        g, v = [sign * x for x in case.gradients["task"]], case.gradients["visual"]
        optimizer.set_gradients(**{**case.gradients, "task": g})
        optimizer.step()
        optimizer.zero_grad()
        masks = mask and [entry["mdgd_mask"] for entry in optimizer.state_dict()["state"].values()]

        # The twin makes the plain step from the same place.
        for twin, x, y in zip(twins, before, masked(g, masks), strict=True):
            twin.data.copy_(x)
            twin.grad = y
        plain.step()
        moves = masked([x.detach().double() - y.double() for x, y in zip(twins, before, strict=True)], masks)
        moves = expected_moves(moves, masked(v, masks), restore)
        assert_close(case.parameters, [y.double() + d for y, d in zip(before, moves, strict=True)])


@given(cases(F64, missing=False), st.sampled_from(list(BASES)))
def test_no_move_raises_the_visual_loss_to_first_order(case, base):
    optimizer = wrap(case.parameters, base)
    v = case.gradients["visual"]
    for sign in (1, -1, 1):
        before = [p.detach().clone() for p in case.parameters]
        optimizer.set_gradients(task=[sign * x for x in case.gradients["task"]], visual=v)
        optimizer.step()
        optimizer.zero_grad()
        moves = [p.detach() - x for p, x in zip(case.parameters, before, strict=True)]
        pairs = [(d.reshape(-1), x.reshape(-1)) for d, x in zip(moves, v, strict=True)]
        # Rounding is that of θ, from which the move is a difference.
        size = max(float(p.detach().norm()) for p in case.parameters)
        assert all(float(d @ x) <= 1e-14 * (1 + size) * float(x.norm()) for d, x in pairs)


@given(cases(), st.sampled_from(list(BASES)), st.booleans())
def test_a_zero_visual_gradient_leaves_the_wrapped_step_bit_for_bit(case, base, absent):
    twins = copies(case.parameters)
    plain, optimizer = BASES[base](twins), wrap(case.parameters, base, restore=0.1)
    g = case.gradients["task"]
    nothing = [None if absent else torch.zeros_like(p) for p in case.parameters]
    g = [torch.zeros_like(p) if x is None else x for x, p in zip(g, case.parameters, strict=True)]
    for _ in range(2):
        optimizer.set_gradients(task=g, visual=nothing)
        optimizer.step()
        optimizer.zero_grad()
        for twin, x in zip(twins, g, strict=True):
            twin.grad = x.clone()
        plain.step()
    assert_same_bits(case.parameters, twins)


def test_the_wrapped_optimizer_steps_on_the_task_gradient_itself():
    case = make_case([(3, 4), (5,)], F64 * 2, 0)
    optimizer = wrap(case.parameters, restore=0.3)
    optimizer.set_gradients(task=case.gradients["task"], visual=case.gradients["visual"])
    optimizer.combine()
    assert_same_bits([p.grad for p in case.parameters], case.gradients["task"])


def test_groups_with_their_own_restore():
    case = make_case([(6,), (6,), (6,)], F64 * 3, 0)
    a, b, c = case.parameters
    start = [p.detach().clone() for p in case.parameters]
    groups = [{"params": [a], "mdgd_restore": 0.2}, {"params": [b, c]}]
    optimizer = MDGDOptimizer(torch.optim.SGD(groups, lr=1.0), StepProject(restore=0.4))
    g, v = case.gradients["task"], case.gradients["visual"][:2]
    # What has no visual gradient moves as it would.
    optimizer.set_gradients(task=g, visual=[*v, None])
    optimizer.step()
    moves = [*expected_moves([-g[0]], v[:1], 0.2), *expected_moves([-g[1]], v[1:], 0.4), -g[2]]
    assert_close(case.parameters, [x + d for x, d in zip(start, moves, strict=True)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["task", "visual"])
@pytest.mark.parametrize("masked_too", [False, True])
def test_fact_2_nan_and_inf_reach_the_gradient(kind, value, masked_too):
    case = make_case([(3, 4), (5,)], (torch.float32,) * 2, 2)
    optimizer = wrap(case.parameters, mask=TopK(0.3) if masked_too else None)
    if masked_too:
        optimizer.set_gradients(**case.gradients)
        optimizer.step()
        optimizer.zero_grad()
    for t, i in ((0, 0), (1, -1)):
        bad = {r: [x.clone() for x in case.gradients[r]] for r in ("task", "visual")}
        bad[kind][t].view(-1)[i] = value
        optimizer.set_gradients(**bad)
        optimizer.combine()
        assert not case.parameters[t].grad.isfinite().all()
        optimizer.zero_grad()


def test_low_precision_moves_are_decoupled_as_far_as_their_rounding_allows():
    case = make_case([(64, 64)], (torch.bfloat16,), 0)
    (p,) = case.parameters
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=1.0), StepProject())
    v = case.gradients["visual"][0]
    g = -v + case.gradients["task"][0]
    start = p.detach().double()
    optimizer.set_gradients(task=[g], visual=[v])
    optimizer.step()
    move = (p.detach().double() - start).reshape(-1)
    plain = -g.double().reshape(-1)
    direction = v.double().reshape(-1)
    cosine = float(move @ direction / (move.norm() * direction.norm()))
    assert float(plain @ direction / (plain.norm() * direction.norm())) > 0.5
    assert abs(cosine) < 0.01

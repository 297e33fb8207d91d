"""Step space with a history: moves against the oracle on what is stored, and what is stored against the gradients."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reproductions.mini.rules import History
from tests.properties import assert_close, assert_orthogonal, assert_same_bits
from tests.reproductions.mini.rules.oracles import decouple_from_history
from tests.strategies import cases, make_case
from torch_mdgd import MDGDOptimizer, TopK

F64 = (torch.float64,)
BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}
MASKS = st.sampled_from([None, TopK(0.4)])


def copies(tensors):
    return [torch.nn.Parameter(x.detach().clone()) for x in tensors]


def sgd(parameters, k, restore=0.0, **more):
    return MDGDOptimizer(torch.optim.SGD(parameters, lr=1.0), History(k, restore), **more)


def make_step(optimizer, task, visual):
    optimizer.set_gradients(task=task, visual=visual)
    optimizer.step()
    optimizer.zero_grad()


def draw(case, seed):
    """Fresh gradients of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in case.parameters]
        for kind in case.gradients
    }


def entries_of(optimizer):
    state = optimizer.state_dict()["state"]
    return [state[i] for i in range(len(state))]


def stored(optimizer, like):
    """What is remembered, at full size: for each direction one tensor for each parameter."""
    rows = []
    for entry, p in zip(entries_of(optimizer), like, strict=True):
        left, right = entry["mdgd_history_left"].double(), entry["mdgd_history_right"].double()
        rows.append((left[:, :, None] * right[:, None]).view(-1, *p.shape) if right.numel() else left)
    return [list(direction) for direction in zip(*rows, strict=True)]


def expected(moves, directions, v, restore):
    out = []
    for t, (move, now) in enumerate(zip(moves, v, strict=True)):
        vectors = torch.stack([x.double().reshape(-1) for x in [*(row[t] for row in directions), now]])
        out.append(decouple_from_history(move.reshape(-1), vectors, vectors[-1], restore).view(move.shape))
    return out


def steps(case, base, mask, count=5, restore=0.0):
    """After each step: the actual moves, those of the oracle, the directions and v."""
    twins = copies(case.parameters)
    optimizer = MDGDOptimizer(BASES[base](case.parameters), History(3, restore), mask=mask)
    plain = BASES[base](twins)
    for seed in range(count):
        before = [p.detach().clone() for p in case.parameters]
        gradients = draw(case, seed)
        optimizer.set_gradients(**gradients)
        optimizer.combine()
        directions = [[x.clone() for x in row] for row in stored(optimizer, case.parameters)]
        optimizer.step()
        optimizer.zero_grad()
        entries = entries_of(optimizer)
        masks = [entry["mdgd_mask"] if mask else torch.ones_like(p) for entry, p in zip(entries, twins, strict=True)]
        for twin, x, g, m in zip(twins, before, gradients["task"], masks, strict=True):
            twin.data.copy_(x)
            twin.grad = g * m
        plain.step()
        plain_moves = [(x.detach().double() - y.double()) * m for x, y, m in zip(twins, before, masks, strict=True)]
        moves = [x.detach().double() - y.double() for x, y in zip(case.parameters, before, strict=True)]
        v = [x * m for x, m in zip(gradients["visual"], masks, strict=True)]
        yield moves, expected(plain_moves, directions, v, restore), directions, v


@settings(max_examples=25)
@given(
    cases((torch.float64, torch.float32), missing=False),
    st.sampled_from(list(BASES)),
    st.sampled_from([0.0, 0.1]),
    MASKS,
)
def test_every_step_equals_the_oracle_on_what_is_stored(case, base, restore, mask):
    for moves, wanted, _, _ in steps(case, base, mask, 5, restore):
        # Of a parameter with fewer numbers than directions nothing but rounding is left.
        assert_close(moves, wanted, [[p.detach() for p in case.parameters], wanted])


@settings(max_examples=20)
@given(cases(F64, missing=False), st.sampled_from(list(BASES)), MASKS)
def test_no_move_has_a_component_along_a_direction(case, base, mask):
    for moves, _, directions, v in steps(case, base, mask, 4):
        size = max(float(p.detach().norm()) for p in case.parameters)
        for row in [*directions, v]:
            for d, x in zip(moves, row, strict=True):
                assert abs(float((d * x).sum())) <= 1e-7 * (size + float(d.norm())) * float(x.norm())


def test_the_oracle_by_hand_and_twice():
    delta = torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)
    rows = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    once = decouple_from_history(delta, rows, rows[2])
    assert torch.allclose(once, torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64), atol=1e-14)
    assert torch.allclose(decouple_from_history(once, rows, rows[2]), once, atol=1e-14)
    along = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64) / math.sqrt(2)
    restored = decouple_from_history(delta, rows, rows[2], 0.5)
    assert torch.allclose(restored, once - 0.5 * math.sqrt(50) * along)


@given(cases(F64, missing=False))
@settings(max_examples=15)
def test_a_move_that_was_decoupled_stays(case):
    optimizer = sgd(case.parameters, 3)
    for seed in range(2):
        gradients = draw(case, seed)
        make_step(optimizer, gradients["task"], gradients["visual"])
    state = copy.deepcopy(optimizer.state_dict())
    g, moves = case.gradients["task"], []
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(state))
        before = [p.detach().clone() for p in case.parameters]
        make_step(optimizer, g, case.gradients["visual"])
        moves.append([p.detach() - x for p, x in zip(case.parameters, before, strict=True)])
        g = [-x for x in moves[-1]]
    for once, twice, x in zip(*moves, case.gradients["task"], strict=True):
        assert float((once - twice).norm()) <= 1e-7 * float(x.norm())


def test_a_direction_of_rank_one_is_stored_as_it_is_and_the_oldest_goes_first():
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(6, 8))
    optimizer = sgd([p], 3)
    seen = []
    for _ in range(5):
        v = torch.outer(torch.randn(6, generator=generator), torch.randn(8, generator=generator))
        seen.append(v / v.norm())
        make_step(optimizer, [torch.zeros(6, 8)], [v])
        kept = [row[0] for row in stored(optimizer, [p])]
        for wanted in seen[-2:]:
            assert min(float((x - wanted).norm()) for x in kept) < 0.01


@pytest.mark.parametrize("shape", [(40, 30), (4, 5, 6)])
def test_one_step_of_iteration_a_step_finds_the_largest_term(shape):
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    v = torch.randn(shape, generator=generator)
    matrix = v.view(shape[0], -1)
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    matrix = U @ torch.diag(sigma * 0.7 ** torch.arange(len(sigma))) @ Vh
    optimizer = sgd([p], 2)
    for _ in range(6):
        make_step(optimizer, [torch.zeros(shape)], [matrix.view(shape)])
    (direction,) = stored(optimizer, [p])
    best = torch.linalg.svdvals(matrix)[0] / matrix.norm()
    assert float(direction[0].norm()) == pytest.approx(float(best), rel=0.02)


def test_a_gradient_orthogonal_to_the_last_one_is_found():
    p = torch.nn.Parameter(torch.zeros(6, 8))
    optimizer = sgd([p], 2)
    for column in (0, 5):
        v = torch.zeros(6, 8)
        v[:, column] = 1
        make_step(optimizer, [torch.zeros(6, 8)], [v])
    (direction,) = stored(optimizer, [p])
    assert float((direction[0] - v / v.norm()).norm()) < 0.01


def test_the_restoring_move_is_neither_removed_nor_undone():
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = sgd([p], 3, restore=0.5)
    basis = torch.eye(3, dtype=torch.float64)
    g = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    make_step(optimizer, [g], [basis[0]])
    assert torch.allclose(p.detach(), torch.tensor([-2.5, -4.0, 0.0], dtype=torch.float64))
    optimizer.set_gradients(task=[g], visual=[basis[2]])
    optimizer.step()
    assert torch.allclose(p.detach(), torch.tensor([-2.5, -8.0, -2.5], dtype=torch.float64))


@pytest.mark.parametrize("absent", [False, True])
def test_without_visual_gradients_earlier_ones_are_removed_and_stay(absent):
    case = make_case([(6, 5), (4,)], F64 * 2, 0)
    optimizer = sgd(case.parameters, 2)
    zero = [None if absent else torch.zeros_like(p) for p in case.parameters]
    twins = copies(case.parameters)
    g = case.gradients["task"]
    make_step(optimizer, g, zero)
    assert_same_bits(case.parameters, [x.detach() - y for x, y in zip(twins, g, strict=True)])
    for v in (case.gradients["visual"], zero, zero):
        before = [p.detach().clone() for p in case.parameters]
        make_step(optimizer, g, v)
    (row,) = stored(optimizer, case.parameters)
    for p, x, y in zip(case.parameters, before, row, strict=True):
        assert float(y.norm()) > 0.3
        assert_orthogonal(p.detach() - x, y, 1e-8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["task", "visual"])
def test_a_bad_number_reaches_the_parameters_and_is_not_remembered(kind, value):
    case = make_case([(6, 5), (4,)], (torch.float32,) * 2, 0)
    optimizer = sgd(case.parameters, 3)
    make_step(optimizer, case.gradients["task"], case.gradients["visual"])
    bad = {name: [x.clone() for x in case.gradients[name]] for name in ("task", "visual")}
    bad[kind][0][1, 2] = value
    optimizer.set_gradients(**bad)
    optimizer.step()
    assert not case.parameters[0].isfinite().all()
    assert case.parameters[1].isfinite().all()
    assert all(x.isfinite().all() for row in stored(optimizer, case.parameters) for x in row)


def test_a_step_that_the_scaler_skips_is_not_remembered():
    case = make_case([(6, 5), (4,)], (torch.float32,) * 2, 0)
    optimizer, scaler = sgd(case.parameters, 3), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for value, count in ((1.0, 1), (math.inf, 1), (2.0, 2)):
        v = [value * x for x in case.gradients["visual"]]
        optimizer.set_gradients(task=case.gradients["task"], visual=v)
        optimizer.combine()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        kept = [row for row in stored(optimizer, case.parameters) if any(float(x.norm()) > 0 for x in row)]
        assert len(kept) == count


def test_elements_outside_a_mask_stay_bit_for_bit():
    case = make_case([(6, 5), (4,)], F64 * 2, 0)
    optimizer = MDGDOptimizer(BASES["adamw"](case.parameters), History(3, 0.1), mask=TopK(0.4))
    before = [p.detach().clone() for p in case.parameters]
    for seed in range(4):
        optimizer.set_gradients(**draw(case, seed))
        optimizer.step()
        optimizer.zero_grad()
    masks = [entry["mdgd_mask"] for entry in entries_of(optimizer)]
    for p, x, mask in zip(case.parameters, before, masks, strict=True):
        assert_same_bits([p.detach()[~mask]], [x[~mask]])
        assert (p.detach()[mask] != x[mask]).all()


def test_bytes_are_those_of_the_formula():
    case = make_case([(64, 48), (40,), (3, 4, 5)], (torch.float32,) * 3, 0)
    found = [
        sum(entry[f"mdgd_history_{side}"].untyped_storage().nbytes() for side in ("left", "right"))
        for entry in entries_of(sgd(case.parameters, 16))
    ]
    assert found == [2 * 15 * (64 + 48), 2 * 15 * 40, 2 * 15 * (3 + 20)]


def test_groups_with_their_own_restoring_move_and_groups_that_come_later():
    a, b, c = (torch.nn.Parameter(torch.ones(4, 5)) for _ in range(3))
    optimizer = sgd([{"params": [a]}, {"params": [b], "mdgd_restore": 0.5}], 3)
    optimizer.add_param_group({"params": [c]})
    assert [tuple(entry["mdgd_history_left"].shape) for entry in entries_of(optimizer)] == [(2, 4)] * 3
    g, v = torch.arange(20.0).view(4, 5), torch.ones(4, 5)
    make_step(optimizer, [g, g, g], [v, v, -v])
    for p, move in ((a, 9.5 - g), (b, 9.5 - g - 0.5 * g.norm() / v.norm() * v), (c, 9.5 - g)):
        torch.testing.assert_close(p.detach(), 1 + move, rtol=0, atol=1e-4)


def test_a_parameter_that_took_no_part_stays_and_remembers_nothing():
    case = make_case([(6, 5), (4,)], F64 * 2, 0)
    optimizer = sgd(case.parameters, 3, restore=0.1)
    make_step(optimizer, case.gradients["task"], case.gradients["visual"])
    rest, before = case.parameters[1].detach().clone(), copy.deepcopy(entries_of(optimizer)[1])
    make_step(optimizer, [case.gradients["task"][0], None], [case.gradients["visual"][0], None])
    assert_same_bits([case.parameters[1]], [rest])
    assert_same_bits([entries_of(optimizer)[1]["mdgd_history_left"]], [before["mdgd_history_left"]])


def test_a_resumed_run_goes_on_bit_for_bit():
    outcomes = []
    for resume in (False, True):
        case = make_case([(6, 5), (4,), ()], F64 * 3, 0)
        optimizer = sgd(case.parameters, 3, restore=0.1)
        for seed in range(6):
            if resume and seed == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = sgd(case.parameters, 3, restore=0.1)
                optimizer.load_state_dict(state)
            gradients = draw(case, seed)
            make_step(optimizer, gradients["task"], gradients["visual"])
        outcomes.append(case.parameters)
    assert_same_bits(*outcomes)


def test_what_does_not_fit_is_refused():
    case = make_case([(6, 5), (4,)], F64 * 2, 0)
    state = sgd(case.parameters, 4).state_dict()
    with pytest.raises(ValueError, match=r"'mdgd_history_left' of parameter 0 has shape \(3, 6\), needed is \(1, 6\)"):
        sgd(copies(case.parameters), 2).load_state_dict(state)
    with pytest.raises(ValueError, match="k must be 2 or more"):
        History(1)
    rule = History(2)
    MDGDOptimizer(torch.optim.SGD(case.parameters), rule)
    with pytest.raises(ValueError, match="another optimizer"):
        MDGDOptimizer(torch.optim.SGD(copies(case.parameters)), rule)
    optimizer = sgd(copies(case.parameters), 3, mask=TopK(0.4), compact=True)
    optimizer.set_gradients(**case.gradients)
    with pytest.raises(ValueError, match="compact=False"):
        optimizer.step()

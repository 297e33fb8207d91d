"""Step space with a history: moves against the oracle on what is stored, and what is stored against the gradients."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties import assert_close, assert_orthogonal, assert_same_bits, flat, split
from tests.strategies import SCOPES, cases, make_case
from torch_mdgd import MDGDOptimizer, TopK
from torch_mdgd.decoupling import decouple_from_history

F64 = (torch.float64,)
BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}
LAYOUTS = st.sampled_from([{}, {"mask": TopK(0.4)}, {"mask": TopK(0.4), "compact": True}])


def copies(tensors):
    return [torch.nn.Parameter(x.detach().clone()) for x in tensors]


def wrap(parameters, base="adamw", history=3, **more):
    return MDGDOptimizer(BASES[base](parameters), update="project", space="step", history=history, **more)


def sgd(parameters, **more):
    return MDGDOptimizer(torch.optim.SGD(parameters, lr=1.0), update="project", space="step", **more)


def draw(case, seed):
    """Fresh gradients of all roles."""
    generator = torch.Generator().manual_seed(seed)
    return {
        role: [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in case.parameters]
        for role in case.gradients
    }


def entries_of(optimizer):
    state = optimizer.state_dict()["state"]
    return [state[i] for i in range(len(state))]


def stored(optimizer, like):
    """What is remembered, at full size: for each direction one tensor for each parameter."""
    entries = entries_of(optimizer)
    rows = []
    for entry, p in zip(entries, like, strict=True):
        left, right = entry["mdgd_history_left"].double(), entry["mdgd_history_right"].double()
        if right.numel():
            rows.append((left[:, :, None] * right[:, None]).view(-1, *p.shape))
        elif "mdgd_positions" in entry:
            full = torch.zeros(len(left), p.numel(), dtype=torch.float64)
            if left.numel():
                full[:, entry["mdgd_positions"].long()] = left
            rows.append(full.view(-1, *p.shape))
        else:
            rows.append(left)
    return [list(direction) for direction in zip(*rows, strict=True)]


def expected(moves, directions, v, scope, restore):
    def one(move, rows, now, like):
        vectors = torch.stack([flat(row, like) for row in [*rows, now]])
        return split(decouple_from_history(flat(move, like), vectors, vectors[-1], restore), like)

    if scope == "global":
        return one(moves, directions, v, moves)
    return [
        one([d], [[row[t]] for row in directions], [x], [d])[0] for t, (d, x) in enumerate(zip(moves, v, strict=True))
    ]


def apply_mask(tensors, masks):
    return tensors if masks is None else [x * m for x, m in zip(tensors, masks, strict=True)]


def masks_of(optimizer, like):
    out = []
    for entry, p in zip(entries_of(optimizer), like, strict=True):
        if "mdgd_positions" in entry:
            mask = torch.zeros(p.numel(), dtype=torch.bool)
            mask[entry["mdgd_positions"].long()] = True
            out.append(mask.view(p.shape))
        else:
            out.append(entry["mdgd_mask"])
    return out


def steps(case, base, layout, count=5, scope="tensor", restore=0.0):
    """After each step: the actual moves, those of the oracle, the directions and v."""
    twins = copies(case.parameters)
    optimizer, plain = wrap(case.parameters, base, scope=scope, restore=restore, **layout), BASES[base](twins)
    for seed in range(count):
        before = [p.detach().clone() for p in case.parameters]
        gradients = draw(case, seed)
        optimizer.set_gradients(**gradients)
        optimizer.combine()
        directions = stored(optimizer, case.parameters)
        optimizer.step()
        optimizer.zero_grad()
        masks = masks_of(optimizer, case.parameters) if layout else None
        for twin, x, y in zip(twins, before, apply_mask(gradients["task"], masks), strict=True):
            twin.data.copy_(x)
            twin.grad = y
        plain.step()
        plain_moves = [x.detach().double() - y.double() for x, y in zip(twins, before, strict=True)]
        moves = [x.detach().double() - y.double() for x, y in zip(case.parameters, before, strict=True)]
        v = apply_mask(gradients["visual"], masks)
        yield moves, expected(apply_mask(plain_moves, masks), directions, v, scope, restore), directions, v


@settings(max_examples=25)
@given(
    cases((torch.float64, torch.float32), missing=False),
    SCOPES,
    st.sampled_from(list(BASES)),
    st.sampled_from([0.0, 0.1]),
    LAYOUTS,
)
def test_every_step_equals_the_oracle_on_what_is_stored(case, scope, base, restore, layout):
    for moves, wanted, _, _ in steps(case, base, layout, 5, scope, restore):
        # Of a parameter with fewer numbers than directions nothing but rounding is left.
        assert_close(moves, wanted, [[p.detach() for p in case.parameters], wanted])


@settings(max_examples=20)
@given(cases(F64, missing=False), SCOPES, st.sampled_from(list(BASES)), LAYOUTS)
def test_no_move_has_a_component_along_a_direction(case, scope, base, layout):
    for moves, _, directions, v in steps(case, base, layout, 4, scope):
        size = max(float(p.detach().norm()) for p in case.parameters)
        for row in [*directions, v]:
            pairs = [(flat(moves, moves), flat(row, moves))] if scope == "global" else zip(moves, row, strict=True)
            assert all(abs(float((d * x).sum())) <= 1e-7 * (size + float(d.norm())) * float(x.norm()) for d, x in pairs)


def test_the_oracle_by_hand_and_twice():
    delta = torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)
    rows = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    once = decouple_from_history(delta, rows, rows[2])
    assert torch.allclose(once, torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64), atol=1e-14)
    assert torch.allclose(decouple_from_history(once, rows, rows[2]), once, atol=1e-14)
    along = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64) / math.sqrt(2)
    restored = decouple_from_history(delta, rows, rows[2], 0.5)
    assert torch.allclose(restored, once - 0.5 * math.sqrt(50) * along)


@given(cases(F64, missing=False), SCOPES)
@settings(max_examples=15)
def test_a_move_that_was_decoupled_stays(case, scope):
    optimizer = sgd(case.parameters, history=3, scope=scope)
    for seed in range(2):
        gradients = draw(case, seed)
        optimizer.set_gradients(task=gradients["task"], visual=gradients["visual"])
        optimizer.step()
        optimizer.zero_grad()
    state = copy.deepcopy(optimizer.state_dict())
    g, moves = case.gradients["task"], []
    for _ in range(2):
        optimizer.load_state_dict(state)
        before = [p.detach().clone() for p in case.parameters]
        optimizer.set_gradients(task=g, visual=case.gradients["visual"])
        optimizer.step()
        optimizer.zero_grad()
        moves.append([p.detach() - x for p, x in zip(case.parameters, before, strict=True)])
        g = [-x for x in moves[-1]]
    for once, twice, x in zip(*moves, case.gradients["task"], strict=True):
        assert float((once - twice).norm()) <= 1e-7 * float(x.norm())


def test_a_direction_of_rank_one_is_stored_as_it_is_and_the_oldest_goes_first():
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(6, 8))
    optimizer = sgd([p], history=3)
    seen = []
    for _ in range(5):
        v = torch.outer(torch.randn(6, generator=generator), torch.randn(8, generator=generator))
        seen.append(v / v.norm())
        optimizer.set_gradients(task=[torch.zeros(6, 8)], visual=[v])
        optimizer.step()
        optimizer.zero_grad()
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
    optimizer = sgd([p], history=2)
    for _ in range(6):
        optimizer.set_gradients(task=[torch.zeros(shape)], visual=[matrix.view(shape)])
        optimizer.step()
        optimizer.zero_grad()
    (direction,) = stored(optimizer, [p])
    best = torch.linalg.svdvals(matrix)[0] / matrix.norm()
    assert float(direction[0].norm()) == pytest.approx(float(best), rel=0.02)


def test_a_gradient_orthogonal_to_the_last_one_is_found():
    p = torch.nn.Parameter(torch.zeros(6, 8))
    optimizer = sgd([p], history=2)
    for column in (0, 5):
        v = torch.zeros(6, 8)
        v[:, column] = 1
        optimizer.set_gradients(task=[torch.zeros(6, 8)], visual=[v])
        optimizer.step()
        optimizer.zero_grad()
    (direction,) = stored(optimizer, [p])
    assert float((direction[0] - v / v.norm()).norm()) < 0.01


def test_the_restoring_move_is_neither_removed_nor_undone():
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = sgd([p], history=3, restore=0.5)
    basis = torch.eye(3, dtype=torch.float64)
    g = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    optimizer.set_gradients(task=[g], visual=[basis[0]])
    optimizer.step()
    optimizer.zero_grad()
    assert torch.allclose(p.detach(), torch.tensor([-2.5, -4.0, 0.0], dtype=torch.float64))
    optimizer.set_gradients(task=[g], visual=[basis[2]])
    optimizer.step()
    assert torch.allclose(p.detach(), torch.tensor([-2.5, -8.0, -2.5], dtype=torch.float64))


@pytest.mark.parametrize("absent", [False, True])
def test_without_visual_gradients_earlier_ones_are_removed_and_stay(absent):
    case = make_case([(6, 5), (4,)], F64 * 2, 0)
    optimizer = sgd(case.parameters, history=2)
    zero = [None if absent else torch.zeros_like(p) for p in case.parameters]
    twins = copies(case.parameters)
    g = case.gradients["task"]
    optimizer.set_gradients(task=g, visual=zero)
    optimizer.step()
    optimizer.zero_grad()
    assert_same_bits(case.parameters, [x.detach() - y for x, y in zip(twins, g, strict=True)])
    for v in (case.gradients["visual"], zero, zero):
        before = [p.detach().clone() for p in case.parameters]
        optimizer.set_gradients(task=g, visual=v)
        optimizer.step()
        optimizer.zero_grad()
    (row,) = stored(optimizer, case.parameters)
    for p, x, y in zip(case.parameters, before, row, strict=True):
        assert float(y.norm()) > 0.3
        assert_orthogonal(p.detach() - x, y, 1e-8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("role", ["task", "visual"])
def test_a_bad_number_reaches_the_parameters_and_is_not_remembered(role, value):
    case = make_case([(6, 5), (4,)], (torch.float32,) * 2, 0)
    optimizer = sgd(case.parameters, history=3)
    optimizer.set_gradients(task=case.gradients["task"], visual=case.gradients["visual"])
    optimizer.step()
    optimizer.zero_grad()
    bad = {r: [x.clone() for x in case.gradients[r]] for r in ("task", "visual")}
    bad[role][0][1, 2] = value
    optimizer.set_gradients(**bad)
    optimizer.step()
    assert not case.parameters[0].isfinite().all()
    assert case.parameters[1].isfinite().all()
    assert all(x.isfinite().all() for row in stored(optimizer, case.parameters) for x in row)


def test_a_step_that_the_scaler_skips_is_not_remembered():
    case = make_case([(6, 5), (4,)], (torch.float32,) * 2, 0)
    optimizer, scaler = sgd(case.parameters, history=3), torch.amp.GradScaler("cpu", init_scale=8.0)
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


@pytest.mark.parametrize("compact", [False, True])
def test_numbers_outside_a_mask_stay_bit_for_bit(compact):
    case = make_case([(6, 5), (4,)], F64 * 2, 0)
    optimizer = wrap(case.parameters, mask=TopK(0.4), compact=compact, restore=0.1)
    before = [p.detach().clone() for p in case.parameters]
    for seed in range(4):
        optimizer.set_gradients(**draw(case, seed))
        optimizer.step()
        optimizer.zero_grad()
    for p, x, mask in zip(case.parameters, before, masks_of(optimizer, case.parameters), strict=True):
        assert_same_bits([p.detach()[~mask]], [x[~mask]])
        assert (p.detach()[mask] != x[mask]).all()


def test_bytes_are_those_of_the_formula():
    case = make_case([(64, 48), (40,), (3, 4, 5)], (torch.float32,) * 3, 0)
    optimizer = sgd(case.parameters, history=16)
    entries = entries_of(optimizer)
    found = [
        sum(entry[f"mdgd_history_{side}"].untyped_storage().nbytes() for side in ("left", "right")) for entry in entries
    ]
    assert found == [2 * 15 * (64 + 48), 2 * 15 * 40, 2 * 15 * (3 + 20)]


def test_groups_with_their_own_history_and_groups_that_come_later():
    a, b, c = (torch.nn.Parameter(torch.ones(4, 5)) for _ in range(3))
    optimizer = sgd([{"params": [a]}, {"params": [b], "history": 1}], history=3)
    optimizer.add_param_group({"params": [c], "history": 5})
    entries = entries_of(optimizer)
    assert [tuple(entry["mdgd_history_left"].shape) for entry in entries] == [(2, 4), (0,), (4, 4)]
    g, v = torch.arange(20.0).view(4, 5), torch.ones(4, 5)
    optimizer.set_gradients(task=[g, g, g], visual=[v, v, -v])
    optimizer.step()
    # From a and c whatever is along v, by both signs; from b only what raises the visual loss, which nothing here does.
    for p, move in ((a, 9.5 - g), (b, -g), (c, 9.5 - g)):
        assert torch.allclose(p.detach(), 1 + move, atol=1e-4)


def test_a_history_of_another_length_takes_its_place_when_loaded():
    case, other = make_case([(6, 5), (4,)], F64 * 2, 0), make_case([(6, 5), (4,)], F64 * 2, 0)
    optimizer = sgd(case.parameters, history=4)
    optimizer.set_gradients(task=case.gradients["task"], visual=case.gradients["visual"])
    optimizer.step()
    loaded = sgd(other.parameters, history=2)
    loaded.load_state_dict(optimizer.state_dict())
    for x, y in zip(stored(loaded, other.parameters), stored(optimizer, case.parameters), strict=True):
        assert_same_bits(x, y)
    bad = optimizer.state_dict()
    bad["state"][0]["mdgd_history_right"] = torch.zeros(3, 7)
    with pytest.raises(ValueError, match=r"'mdgd_history_right' of parameter 0 has shape \(3, 7\), needed is \(3, 5\)"):
        loaded.load_state_dict(bad)

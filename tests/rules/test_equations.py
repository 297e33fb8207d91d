"""Equations (6)-(11): the flat float64 forms by hand, and their properties through the optimizer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import assert_close, assert_orthogonal, expected, flat, split
from tests.strategies import SCOPES, UPDATES, WEIGHTS, Case, cases, make_case
from torch_mdgd import MDGDOptimizer, TopK, equations, kernels

F64 = (torch.float64,)


def combined(case: Case, **settings):
    """d, as MDGDOptimizer leaves it in .grad."""
    for p in case.parameters:
        p.grad = None
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=1.0), **settings)
    optimizer.set_gradients(**case.gradients)
    optimizer.combine()
    return [p.grad for p in case.parameters]


def vectors(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


# By hand, with numbers that make every ratio a short fraction.


def test_decouple_by_hand():
    g, v = vectors([3.0, 1.0], [1.0, 1.0])
    assert equations.decouple(g, v).tolist() == [1.0, -1.0]


def test_regularizer_by_hand():
    g_tilde, g0_tilde = vectors([1.0, -1.0], [2.0, 0.0])
    assert equations.regularizer(g_tilde, g0_tilde).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("update", "wanted"),
    [("regularize", [3 + 2 + 10, 1 + 2 + 0]), ("reference", [2 + 10 / 10, 2.0]), ("project", [1 + 2.0, -1 + 2.0])],
)
def test_mdgd_by_hand(update, wanted):
    g, v, g0, v0 = vectors([3.0, 1.0], [1.0, 1.0], [2.0, 7.0], [0.0, 1.0])
    # g~ = (1, −1), g~0 = (2, 0), r = (1, 0); α = 2, β = 10.
    assert equations.mdgd(g, v, g0, v0, 2.0, 10.0, update).tolist() == wanted


def test_mdgd_gm_by_hand():
    g, v, mask = vectors([3.0, 1.0, 5.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0])
    assert equations.mdgd_gm(g, v, mask, 2.0).tolist() == [5.0, 0.0, 7.0]


def test_similarities_by_hand():
    x, y = vectors([2.0, -3.0, 0.0, -1.0], [4.0, 5.0, 1.0, -2.0])
    assert equations.product(x, y).tolist() == [8.0, -15.0, 0.0, 2.0]
    assert equations.sign_agreement(x, y).tolist() == [1.0, -1.0, 0.0, 1.0]


# The list form against the flat form, for every update, scope, weight, shape, dtype and missing gradient.


@given(cases(), UPDATES, SCOPES, WEIGHTS, WEIGHTS)
def test_every_form_equals_the_oracle(case, update, scope, align, regularize):
    form = {"update": update, "scope": scope, "align": align, "regularize": regularize}
    wanted = expected(case.roles, case.parameters, **form)
    weight = 1 + align + regularize
    scale = [[None if x is None else weight * x for x in role] for role in case.roles]
    absent = [all(role[t] is None for role in case.roles) for t in range(len(case.parameters))]

    actual = combined(case, **form)

    assert_close(actual, wanted, scale)
    assert [x is None for x in actual] == absent
    assert all(x is None or x.dtype == p.dtype for x, p in zip(actual, case.parameters, strict=True))


@given(cases(), SCOPES, WEIGHTS)
def test_projection_alone_needs_no_gradients_at_the_reference(case, scope, align):
    wanted = expected(case.roles, case.parameters, update="project", scope=scope, align=align)
    del case.gradients["reference_task"], case.gradients["reference_visual"]
    assert_close(combined(case, update="project", scope=scope, align=align), wanted, [*case.roles[:2], wanted])


@given(cases(F64), SCOPES, WEIGHTS)
def test_without_regularizer_d_is_task_plus_visual(case, scope, align):
    g, v = (split(flat(role, case.parameters), case.parameters) for role in case.roles[:2])
    wanted = [x + align * y for x, y in zip(g, v, strict=True)]
    del case.gradients["reference_task"], case.gradients["reference_visual"]
    assert_close(combined(case, regularize=0.0, scope=scope, align=align), wanted, [*case.roles[:2], wanted])


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_a_single_number_has_nothing_left_when_decoupled(seed, dtype):
    case = make_case([()], (dtype,), seed)
    g, v = (float(role[0]) for role in case.roles[:2])
    d = float(combined(case, align=0.5)[0])
    assert d == pytest.approx(g + 0.5 * v, rel=1e-5, abs=1e-6 * abs(g))


# Properties.


@given(cases(F64))
def test_decoupled_gradient_is_orthogonal_to_the_visual_gradient_of_each_tensor(case):
    d = combined(case, update="project", align=0.0, scope="tensor")
    for x, v, g in zip(d, case.gradients["visual"], case.gradients["task"], strict=True):
        if x is not None and v is not None and g is not None:
            # Beside g and not g~, which is nothing but rounding where g and v are parallel.
            assert abs(float((x * v).sum())) <= 1e-14 * float(g.norm() * v.norm()) * max(1, math.sqrt(x.numel()))


@given(cases(F64))
def test_decoupled_gradient_is_orthogonal_to_the_visual_gradient_globally(case):
    g = flat(case.gradients["task"], case.parameters)
    d = flat(combined(case, update="project", align=0.0, scope="global"), case.parameters)
    v = flat(case.gradients["visual"], case.parameters)
    assert abs(float(d @ v)) <= 1e-13 * float(g.norm() * v.norm())


@given(cases(F64), SCOPES)
def test_projecting_twice_changes_nothing(case, scope):
    once = [None if x is None else x.clone() for x in combined(case, update="project", align=0.0, scope=scope)]
    again = Case(case.parameters, {**case.gradients, "task": once})
    twice = combined(again, update="project", align=0.0, scope=scope)
    assert_close(
        twice, [torch.zeros_like(p) if x is None else x for x, p in zip(once, case.parameters, strict=True)], case.roles
    )


@given(cases(), UPDATES, SCOPES, st.integers(-20, 20))
def test_d_scales_with_a_common_factor(case, update, scope, exponent):
    # A power of two leaves every rounding as it is, so equality is exact.
    factor = 2.0**exponent
    scaled = Case(
        [torch.nn.Parameter(p.detach().clone()) for p in case.parameters],
        {role: [None if x is None else x * factor for x in row] for role, row in case.gradients.items()},
    )
    once, more = (combined(c, update=update, scope=scope, align=0.7) for c in (case, scaled))
    for x, y in zip(once, more, strict=True):
        assert (x is None and y is None) or torch.equal(x * factor, y)


@given(cases(F64, missing=False), UPDATES, st.randoms(use_true_random=False))
def test_order_of_parameters_does_not_matter_in_global_scope(case, update, random):
    order = list(range(len(case.parameters)))
    random.shuffle(order)
    moved = Case([case.parameters[i] for i in order], {r: [row[i] for i in order] for r, row in case.gradients.items()})
    once = [x.clone() for x in combined(case, update=update, scope="global")]
    permuted = combined(moved, update=update, scope="global")
    assert_close([permuted[order.index(i)] for i in range(len(order))], once, case.roles)


@given(cases(F64, missing=False), UPDATES)
def test_splitting_parameters_does_not_matter_in_global_scope(case, update):
    def pieces(x):
        return list(x.detach().reshape(-1).split(2))

    parts = Case(
        [torch.nn.Parameter(y.clone()) for p in case.parameters for y in pieces(p)],
        {role: [y.clone() for x in row for y in pieces(x)] for role, row in case.gradients.items()},
    )
    whole = combined(case, update=update, scope="global")
    pieced = combined(parts, update=update, scope="global")
    assert_close([flat(pieced, parts.parameters)], [flat(whole, case.parameters)])


@given(st.integers(0, 2**31), UPDATES)
def test_orthogonal_transformations_commute_in_tensor_scope(seed, update):
    case = make_case([(6, 4), (5,)], F64 * 2, seed)
    generator = torch.Generator().manual_seed(seed)
    turns = [torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (24, 5)]

    def turn(tensors):
        return [(Q @ x.detach().reshape(-1)).view(x.shape) for Q, x in zip(turns, tensors, strict=True)]

    turned = Case(
        [torch.nn.Parameter(x) for x in turn(case.parameters)], {r: turn(x) for r, x in case.gradients.items()}
    )
    wanted = turn(combined(case, update=update))
    assert_close(combined(turned, update=update), wanted, case.roles)


@given(st.integers(0, 2**31), UPDATES)
def test_global_scope_pools_only_the_groups_that_ask_for_it(seed, update):
    case = make_case([(3, 2), (4,), (7,), (2, 2)], F64 * 4, seed)
    a, b, c, e = case.parameters
    form = {"update": update, "align": 0.4, "regularize": 0.6}
    wanted_global = expected([role[:2] for role in case.roles], [a, b], scope="global", **form)
    wanted_tensor = expected([role[2:3] for role in case.roles], [c], scope="tensor", **form)
    plain = expected([role[3:] for role in case.roles], [e], update="project", align=0.0)
    groups = [
        {"params": [a, b], "scope": "global"},
        {"params": [c]},
        {"params": [e], "update": "project", "align": 0.0},
    ]
    optimizer = MDGDOptimizer(torch.optim.SGD(groups, lr=1.0), **form)
    optimizer.set_gradients(**case.gradients)
    optimizer.combine()
    assert_close([p.grad for p in case.parameters], [*wanted_global, *wanted_tensor, *plain], case.roles)


def test_non_contiguous_gradients():
    case = make_case([(4, 6), (2, 3, 4)], F64 * 2, 5)
    turned = {r: [x.transpose(0, 1).contiguous().transpose(0, 1) for x in row] for r, row in case.gradients.items()}
    assert not turned["task"][0].is_contiguous()
    assert_close(combined(Case(case.parameters, turned)), expected(case.roles, case.parameters), case.roles)


# The facts that decide correctness.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("update", ["regularize", "reference", "project"])
def test_fact_1_zero_visual_gradients_are_the_identity(update, scope, dtype):
    case = make_case([(3, 4), (5,)], (dtype, dtype), 1)
    zeros = [torch.zeros_like(x) for x in case.gradients["task"]]
    g = [x.clone() for x in case.gradients["task"]]
    # At the first step θ = φ: the two task gradients are one.
    first = Case(case.parameters, {"task": g, "visual": zeros, "reference_task": g, "reference_visual": zeros})
    d = combined(first, update=update, scope=scope, align=3.0, regularize=1.0)
    # g~ = g and r = g, without a NaN from 0/0.
    wanted = [2 * x if update == "regularize" else x for x in g]
    assert all(torch.equal(x, y) for x, y in zip(d, wanted, strict=True))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_fact_1_missing_visual_gradients_are_the_identity(scope):
    case = make_case([(3, 4), (5,)], (torch.float32,) * 2, 1)
    g = [x.clone() for x in case.gradients["task"]]
    d = combined(Case(case.parameters, {"task": g, "visual": [None, None]}), update="project", scope=scope)
    assert all(torch.equal(x, y) for x, y in zip(d, g, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["task", "visual", "reference_task", "reference_visual"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("update", ["regularize", "reference", "project"])
def test_fact_2_nan_and_inf_reach_the_gradient(update, scope, role, value, masked):
    case = make_case([(3, 4), (5,)], (torch.float32,) * 2, 2)
    mask = TopK(0.3) if masked else None
    optimizer = MDGDOptimizer(
        torch.optim.SGD(case.parameters, lr=0.0), update=update, scope=scope, align=0.0, mask=mask
    )
    if masked:
        optimizer.set_gradients(**case.gradients)
        optimizer.step()
        optimizer.zero_grad()
    # In the first and in the last number: inside and outside of any mask.
    for t, i in ((0, 0), (1, -1)):
        bad = {r: [x.clone() for x in row] for r, row in case.gradients.items()}
        bad[role][t].view(-1)[i] = value
        optimizer.set_gradients(**bad)
        optimizer.combine()
        assert not case.parameters[t].grad.isfinite().all()
        optimizer.zero_grad()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("role", ["task", "visual"])
def test_fact_2_where_the_other_gradients_are_missing(role, value):
    case = make_case([(3,)], (torch.float32,), 2)
    gradients = {"task": [None], "visual": [None], role: [torch.tensor([0.0, value, 0.0])]}
    d = combined(Case(case.parameters, gradients), update="project", align=0.0)
    assert not d[0].isfinite().all()


@pytest.mark.parametrize("update", ["regularize", "reference", "project"])
def test_fact_3_loss_scaling_scales_d(update):
    case = make_case([(3, 4), (5,)], F64 * 2, 3)
    scaled = Case(case.parameters, {r: [3.7 * x for x in row] for r, row in case.gradients.items()})
    wanted = [3.7 * x for x in expected(case.roles, case.parameters, update=update)]
    assert_close(combined(scaled, update=update), wanted, scaled.roles)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-7), (torch.float64, 1e-14)]
)
def test_fact_4_inner_products_of_millions_of_numbers_keep_their_digits(dtype, tolerance):
    n = 3_000_000
    generator = torch.Generator().manual_seed(0)
    # A common offset, so that the sum is large and a running float32 sum drops the low digits.
    g, v = ((torch.randn(n, generator=generator) + 1).to(dtype) for _ in range(2))
    wanted, size = float(g.double() @ v.double()), float(g.double().norm() * v.double().norm())
    assert abs(float(kernels.inner_products([[g]], [[v]])[0, 0, 0]) - wanted) <= tolerance * size


def test_fact_4_equal_numbers_do_not_pile_up_their_rounding():
    x = torch.full((1_000_000,), 0.1)
    wanted = 1_000_000 * float(x[0].double()) ** 2
    assert float(kernels.inner_products([[x]])) == pytest.approx(wanted, rel=2e-7)


def test_fact_4_decoupled_gradient_of_millions_of_numbers_is_orthogonal():
    n = 3_000_000
    generator = torch.Generator().manual_seed(0)
    g, v = (torch.randn(n, generator=generator) + 1 for _ in range(2))
    p = torch.nn.Parameter(torch.zeros(n))
    d = combined(Case([p], {"task": [g.clone()], "visual": [v]}), update="project", align=0.0)[0]
    # Rounding each number of g~ to float32 leaves about 2^-25 √n of a length of √n.
    assert_orthogonal(d, v, 1e-7)
    assert float(g.double() @ v.double()) > 0.4 * float(g.double().norm() * v.double().norm())


def test_fact_4_projection_of_bf16_gradients_is_exact_to_their_rounding():
    n = 1_000_000
    generator = torch.Generator().manual_seed(0)
    g, v = ((torch.randn(n, generator=generator) + 1).bfloat16() for _ in range(2))
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16))
    wanted = equations.decouple(g.double(), v.double())
    d = combined(Case([p], {"task": [g.clone()], "visual": [v]}), update="project", align=0.0)[0]
    # One rounding to bf16, of a sum formed in float32.
    error = (d.double() - wanted).abs()
    assert (error <= 2.0**-8 * wanted.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fact_5_reference_gradient_nearly_parallel_to_its_visual_gradient(dtype):
    # v0 = (1, 0), g0 = (1, ε): g~0 = (0, ε), whose squared length is lost in 1 + ε² − 1.
    epsilon = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    g0, v0 = torch.tensor([1.0, epsilon], dtype=dtype), torch.tensor([1.0, 0.0], dtype=dtype)
    g, v = torch.tensor([2.0, 3.0], dtype=dtype), torch.tensor([0.0, 0.0], dtype=dtype)
    p = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    gradients = {"task": [g], "visual": [v], "reference_task": [g0], "reference_visual": [v0]}
    d = combined(Case([p], gradients), update="reference", align=0.0)[0]
    # r = (⟨g, g~0⟩ / ⟨g~0, g~0⟩) g~0 = (0, 3).
    assert d[1].item() == pytest.approx(3.0, rel=1e-5)
    assert abs(d[0].item()) < 1e-5


def test_fact_6_missing_in_one_role_is_zero_and_in_all_roles_stays_missing():
    shapes = [(3,), (3,), (3,)]
    missing = {("task", 0), ("visual", 1)} | {
        (role, 2) for role in ("task", "visual", "reference_task", "reference_visual")
    }
    case = make_case(shapes, F64 * 3, 4, missing)
    wanted = expected(case.roles, case.parameters)
    d = combined(case)
    assert d[2] is None
    assert_close(d, wanted, case.roles)

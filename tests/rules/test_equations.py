"""Equations (6)-(11): the flat float64 forms by hand, and their properties through the optimizer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import assert_close, assert_orthogonal, assert_same_bits, expected, flat, split
from tests.reference import equations
from tests.strategies import WEIGHTS, Case, cases, make_case
from torch_mdgd import MDGD, MDGDOptimizer, Project, kernels

F64 = (torch.float64,)
RULES = st.sampled_from([MDGD, Project])


def combined(case: Case, rule=None):
    """d, as MDGDOptimizer leaves it in .grad."""
    for p in case.parameters:
        p.grad = None
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=1.0), rule)
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


def test_mdgd_by_hand():
    g, v, g0, v0 = vectors([3.0, 1.0], [1.0, 1.0], [2.0, 7.0], [0.0, 1.0])
    # g~ = (1, −1), g~0 = (2, 0), r = (1, 0); α = 2, β = 10.
    assert equations.mdgd(g, v, g0, v0, 2.0, 10.0).tolist() == [3 + 2 + 10, 1 + 2 + 0]


def test_project_by_hand():
    g, v = vectors([3.0, 1.0], [1.0, 1.0])
    assert equations.project(g, v, 2.0).tolist() == [1 + 2.0, -1 + 2.0]


def test_mdgd_gm_by_hand():
    g, v, mask = vectors([3.0, 1.0, 5.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0])
    assert equations.mdgd_gm(g, v, mask, 2.0).tolist() == [5.0, 0.0, 7.0]


def test_similarity_by_hand():
    # g~ = (1, −1, 0), g~0 = (2, 0, 5).
    g, v, g0, v0 = vectors([3.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 7.0, 5.0], [0.0, 1.0, 0.0])
    assert equations.similarity(g, v, g0, v0).tolist() == [2.0, 0.0, 0.0]


# The list form against the flat form, for every weight, shape, dtype and missing gradient.


def check(case: Case, rule, **weights) -> None:
    wanted = expected(case.kinds, case.parameters, rule=rule.__name__, **weights)
    scale = [[None if x is None else (1 + sum(weights.values())) * x for x in kind] for kind in case.kinds]
    absent = [all(kind[t] is None for kind in case.kinds) for t in range(len(case.parameters))]

    actual = combined(case, rule(**weights))

    assert_close(actual, wanted, [*scale, wanted])
    assert [x is None for x in actual] == absent
    assert all(x is None or x.dtype == p.dtype for x, p in zip(actual, case.parameters, strict=True))


@given(cases(), WEIGHTS, WEIGHTS)
def test_mdgd_equals_the_flat_form(case, align, regularize):
    check(case, MDGD, align=align, regularize=regularize)


@given(cases(), WEIGHTS)
def test_project_equals_the_flat_form_without_gradients_at_the_reference(case, align):
    del case.gradients["reference_task"], case.gradients["reference_visual"]
    check(case, Project, align=align)


@given(cases(F64), WEIGHTS)
def test_without_regularizer_d_is_task_plus_visual(case, align):
    g, v = (split(flat(kind, case.parameters), case.parameters) for kind in case.kinds[:2])
    wanted = [x + align * y for x, y in zip(g, v, strict=True)]
    del case.gradients["reference_task"], case.gradients["reference_visual"]
    assert_close(combined(case, MDGD(align, regularize=0)), wanted, [*case.kinds[:2], wanted])


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_a_single_number_has_nothing_left_when_decoupled(seed, dtype):
    case = make_case([()], (dtype,), seed)
    g, v = (float(kind[0]) for kind in case.kinds[:2])
    d = float(combined(case, MDGD(0.5))[0])
    assert d == pytest.approx(g + 0.5 * v, rel=1e-5, abs=1e-6 * abs(g))


# Properties.


@given(cases(F64))
def test_decoupled_gradient_is_orthogonal_to_the_visual_gradient_of_each_tensor(case):
    d = combined(case, Project(0.0))
    for x, v, g in zip(d, case.gradients["visual"], case.gradients["task"], strict=True):
        if x is not None and v is not None and g is not None:
            # Beside g and not g~, which is nothing but rounding where g and v are parallel.
            assert abs(float((x * v).sum())) <= 1e-14 * float(g.norm() * v.norm()) * max(1, math.sqrt(x.numel()))


@given(cases(F64))
def test_projecting_twice_changes_nothing(case):
    once = [None if x is None else x.clone() for x in combined(case, Project(0.0))]
    again = Case(case.parameters, {**case.gradients, "task": once})
    twice = combined(again, Project(0.0))
    assert_close(
        twice, [torch.zeros_like(p) if x is None else x for x, p in zip(once, case.parameters, strict=True)], case.kinds
    )


@given(cases(), RULES, st.integers(-20, 20))
def test_d_scales_with_a_common_factor(case, rule, exponent):
    # A power of two leaves every rounding as it is, so equality is exact.
    factor = 2.0**exponent
    scaled = Case(
        [torch.nn.Parameter(p.detach().clone()) for p in case.parameters],
        {kind: [None if x is None else x * factor for x in row] for kind, row in case.gradients.items()},
    )
    once, more = (combined(c, rule(0.7)) for c in (case, scaled))
    for x, y in zip(once, more, strict=True):
        assert (x is None and y is None) or torch.equal(x * factor, y)


@given(cases(F64, missing=False), RULES, st.randoms(use_true_random=False))
def test_order_of_parameters_does_not_matter(case, rule, random):
    order = list(range(len(case.parameters)))
    random.shuffle(order)
    moved = Case([case.parameters[i] for i in order], {r: [row[i] for i in order] for r, row in case.gradients.items()})
    once = [x.clone() for x in combined(case, rule())]
    permuted = combined(moved, rule())
    assert_close([permuted[order.index(i)] for i in range(len(order))], once, case.kinds)


@given(st.integers(0, 2**31), RULES)
def test_orthogonal_transformations_commute(seed, rule):
    case = make_case([(6, 4), (5,)], F64 * 2, seed)
    generator = torch.Generator().manual_seed(seed)
    turns = [torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (24, 5)]

    def turn(tensors):
        return [(Q @ x.detach().reshape(-1)).view(x.shape) for Q, x in zip(turns, tensors, strict=True)]

    turned = Case(
        [torch.nn.Parameter(x) for x in turn(case.parameters)], {r: turn(x) for r, x in case.gradients.items()}
    )
    wanted = turn(combined(case, rule()))
    assert_close(combined(turned, rule()), wanted, case.kinds)


def test_non_contiguous_gradients():
    case = make_case([(4, 6), (2, 3, 4)], F64 * 2, 5)
    turned = {r: [x.transpose(0, 1).contiguous().transpose(0, 1) for x in row] for r, row in case.gradients.items()}
    assert not turned["task"][0].is_contiguous()
    assert_close(combined(Case(case.parameters, turned)), expected(case.kinds, case.parameters), case.kinds)


# The facts that decide correctness.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "factor"), [(MDGD(3.0), 2), (MDGD(3.0, regularize=0), 1), (Project(3.0), 1)])
def test_fact_1_zero_visual_gradients_are_the_identity(rule, factor, dtype):
    case = make_case([(3, 4), (5,)], (dtype, dtype), 1)
    zeros = [torch.zeros_like(x) for x in case.gradients["task"]]
    g = [x.clone() for x in case.gradients["task"]]
    # At the first step θ = φ: the two task gradients are one.
    first = Case(case.parameters, {"task": g, "visual": zeros, "reference_task": g, "reference_visual": zeros})
    # g~ = g and r = g, without a NaN from 0/0.
    assert_same_bits(combined(first, rule), [factor * x for x in g])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["task", "visual"])
def test_fact_2_where_the_other_gradients_are_missing(kind, value):
    case = make_case([(3,)], (torch.float32,), 2)
    gradients = {"task": [None], "visual": [None], kind: [torch.tensor([0.0, value, 0.0])]}
    d = combined(Case(case.parameters, gradients), Project(0.0))
    assert not d[0].isfinite().all()


@pytest.mark.parametrize("rule", [MDGD, Project])
def test_fact_3_loss_scaling_scales_d(rule):
    case = make_case([(3, 4), (5,)], F64 * 2, 3)
    scaled = Case(case.parameters, {r: [3.7 * x for x in row] for r, row in case.gradients.items()})
    wanted = [3.7 * x for x in expected(case.kinds, case.parameters, rule=rule.__name__)]
    assert_close(combined(scaled, rule()), wanted, scaled.kinds)


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
    d = combined(Case([p], {"task": [g.clone()], "visual": [v]}), Project(0.0))[0]
    # Rounding each number of g~ to float32 leaves about 2^-25 √n of a length of √n.
    assert_orthogonal(d, v, 1e-7)
    assert float(g.double() @ v.double()) > 0.4 * float(g.double().norm() * v.double().norm())


def test_fact_4_projection_of_bf16_gradients_is_exact_to_their_rounding():
    n = 1_000_000
    generator = torch.Generator().manual_seed(0)
    g, v = ((torch.randn(n, generator=generator) + 1).bfloat16() for _ in range(2))
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16))
    wanted = equations.decouple(g.double(), v.double())
    d = combined(Case([p], {"task": [g.clone()], "visual": [v]}), Project(0.0))[0]
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
    d = combined(Case([p], gradients), MDGD(0.0))[0]
    # r = (⟨g, g~0⟩ / ⟨g~0, g~0⟩) g~0 = (0, 3), and d = g + r.
    assert d.tolist() == pytest.approx([2.0, 6.0], rel=1e-5)


def test_fact_6_missing_in_one_role_is_zero_and_in_all_roles_stays_missing():
    shapes = [(3,), (3,), (3,)]
    missing = {("task", 0), ("visual", 1)} | {
        (kind, 2) for kind in ("task", "visual", "reference_task", "reference_visual")
    }
    case = make_case(shapes, F64 * 3, 4, missing)
    wanted = expected(case.kinds, case.parameters)
    d = combined(case)
    assert d[2] is None
    assert_close(d, wanted, case.kinds)

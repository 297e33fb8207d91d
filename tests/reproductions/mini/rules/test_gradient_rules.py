"""Rules of gradients: r in place of g, and all parameters as one vector."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from reproductions.mini.rules import Global, Reference
from tests.properties import assert_close, flat, split
from tests.reference import equations
from tests.reproductions.mini.rules import oracles
from tests.strategies import cases, make_case
from torch_mdgd import MDGD, MDGDOptimizer, Project, TopK
from torch_mdgd.rules.base import KINDS

F64 = (torch.float64,)
WEIGHTS = st.sampled_from([0.0, 0.3, 1.0, 2.5])
RULES = {
    "MDGD": (lambda a, b: MDGD(a, b), equations.mdgd),
    "Project": (lambda a, b: Project(a), lambda g, v, g0, v0, a, b: equations.project(g, v, a)),
    "Reference": (lambda a, b: Reference(a), lambda g, v, g0, v0, a, b: oracles.reference(g, v, g0, v0, a)),
}


def combined(parameters, gradients, rule, mask=None):
    """d, as MDGDOptimizer leaves it in .grad."""
    for p in parameters:
        p.grad = None
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=1.0), rule, mask=mask)
    optimizer.set_gradients(**gradients)
    optimizer.combine()
    return [p.grad for p in parameters]


def oracle(case, parts, form, align, regularize):
    """d in float64, each of the parts of the parameters as one vector."""
    out = [None] * len(case.parameters)
    for part in parts:
        like = [case.parameters[t] for t in part]
        vectors = [flat([case.gradients[kind][t] for t in part], like) for kind in KINDS]
        for t, d in zip(part, split(form(*vectors, align, regularize), like), strict=True):
            out[t] = d
    return out


@given(cases(), st.sampled_from(list(RULES)), st.booleans(), WEIGHTS, WEIGHTS)
def test_every_rule_equals_the_oracle(case, name, pooled, align, regularize):
    # A step without any is one without pictures: d = g.
    assume(any(x is not None for x in case.gradients["visual"]))
    # One without any at φ has no r: d = g + αv.
    assume(name != "Reference" or any(x is not None for kind in KINDS[2:] for x in case.gradients[kind]))
    make, form = RULES[name]
    rule, everything = make(align, regularize), range(len(case.parameters))
    wanted = oracle(case, [everything] if pooled else [[t] for t in everything], form, align, regularize)
    weight = 1 + align + regularize
    scale = [[None if x is None else weight * x for x in case.gradients[kind]] for kind in KINDS]
    actual = combined(case.parameters, case.gradients, Global(rule) if pooled else rule)
    assert_close(actual, wanted, scale)


@given(cases(F64))
def test_what_is_decoupled_as_one_vector_is_orthogonal_to_the_visual_gradient(case):
    g, v = (flat(case.gradients[kind], case.parameters) for kind in KINDS[:2])
    d = flat(combined(case.parameters, case.gradients, Global(Project(0.0))), case.parameters)
    assert abs(float(d @ v)) <= 1e-13 * float(g.norm() * v.norm())


@given(cases(F64, missing=False), st.sampled_from(list(RULES)))
def test_splitting_parameters_does_not_matter_to_one_vector(case, name):
    def pieces(tensors):
        return [y.clone() for x in tensors for y in x.detach().reshape(-1).split(2)]

    rule = RULES[name][0](1.0, 1.0)
    parts = [torch.nn.Parameter(x) for x in pieces(case.parameters)]
    whole = combined(case.parameters, case.gradients, Global(rule))
    pieced = combined(parts, {kind: pieces(row) for kind, row in case.gradients.items()}, Global(rule))
    assert_close([flat(pieced, parts)], [flat(whole, case.parameters)])


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_zero_visual_gradients_remove_nothing(name, pooled):
    case = make_case([(3, 4), (5,)], (torch.float32,) * 2, 1)
    g, rule = case.gradients["task"], RULES[name][0](3.0, 1.0)
    zeros = [torch.zeros_like(x) for x in g]
    # At the first step θ = φ, and the two task gradients are one.
    first = {"task": g, "visual": zeros, "reference_task": g, "reference_visual": zeros}
    d = combined(case.parameters, first, Global(rule) if pooled else rule)
    for x, y in zip(d, g, strict=True):
        torch.testing.assert_close(x, 2 * y if name == "MDGD" else y)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", ["MDGD", "Reference"])
def test_nan_and_inf_reach_the_gradient(name, pooled, kind, value, masked):
    case = make_case([(3, 4), (5,)], (torch.float32,) * 2, 2)
    rule = RULES[name][0](0.0, 1.0)
    base = torch.optim.SGD(case.parameters, lr=0.0)
    optimizer = MDGDOptimizer(base, Global(rule) if pooled else rule, mask=TopK(0.3) if masked else None)
    if masked:
        optimizer.set_gradients(**case.gradients)
        optimizer.step()
        optimizer.zero_grad()
    bad = {k: [x.clone() for x in row] for k, row in case.gradients.items()}
    bad[kind][1].view(-1)[-1] = value
    optimizer.set_gradients(**bad)
    optimizer.combine()
    assert not case.parameters[1].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reference_gradient_nearly_parallel_to_its_visual_gradient_keeps_its_digits(dtype):
    # v0 = (1, 0), g0 = (1, ε): g~0 = (0, ε), whose squared length is lost in 1 + ε² − 1.
    epsilon = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    rows = ([2.0, 3.0], [0.0, 0.0], [1.0, epsilon], [1.0, 0.0])
    gradients = {kind: [torch.tensor(row, dtype=dtype)] for kind, row in zip(KINDS, rows, strict=True)}
    (d,) = combined([torch.nn.Parameter(torch.zeros(2, dtype=dtype))], gradients, Reference(0.0))
    # r = (⟨g, g~0⟩ / ⟨g~0, g~0⟩) g~0 = (0, 3).
    assert d[1].item() == pytest.approx(3.0, rel=1e-5)
    assert abs(d[0].item()) < 1e-5


def test_a_step_without_pictures_is_the_wrapped_optimizers():
    case = make_case([(3, 4), (5,)], F64 * 2, 3)
    for rule in (Reference(2.0), Global(MDGD())):
        optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=1.0), rule)
        assert optimizer.needs() == KINDS
        assert optimizer.needs(pictures=False) == ("task",)
        optimizer.set_gradients(task=case.gradients["task"], visual=[None, None])
        optimizer.combine()
        for p, g in zip(case.parameters, case.gradients["task"], strict=True):
            assert torch.equal(p.grad, g)
        optimizer.zero_grad()

"""MDGD-GM: exactly the right numbers move, and the others not by a bit."""

from weakref import WeakSet

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from tests.properties import assert_close, assert_same_bits, bits, expected, flat
from tests.reference import equations
from tests.strategies import WEIGHTS, cases, make_case
from torch_mdgd import MDGD, Given, Magnitude, MDGDOptimizer, Project, Random, StepProject, TopK, kernels
from torch_mdgd.masks.base import ScoreInputs, restore_outside_

F64 = (torch.float64,)
BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
}
RULES = [MDGD(), StepProject(0.1)]


def masks_of(optimizer):
    return [entry["mdgd_mask"] for entry in optimizer.state_dict()["state"].values()]


def chosen(case, mask):
    """The masks after one step."""
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), mask=mask)
    optimizer.set_gradients(**case.gradients)
    optimizer.step()
    return masks_of(optimizer)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan"), True])
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="TopK: fraction must"):
        TopK(fraction)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0.1, refresh=0), "refresh must be a whole number of at least 1"),
        (lambda: TopK(0.1, refresh=1.5), "refresh must be a whole number of at least 1, got 1.5"),
        (lambda: TopK("a"), "TopK: fraction must be a finite number"),
        (lambda: Random(0.0), "Random: fraction must lie in"),
        (lambda: Magnitude(2.0), "Magnitude: fraction must lie in"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def scored(scores, mask):
    """The masks that these scores choose: as gradients g~ with ones for g~0."""
    parameters = [torch.zeros_like(s) for s in scores]
    ones = [torch.ones_like(s) for s in scores]
    return mask.choose(parameters, ScoreInputs(scores, [None] * len(scores), ones, torch.zeros(len(scores)).double()))


def test_scores_with_nan_are_refused_by_position():
    with pytest.raises(ValueError, match=r"\b1\b.*NaN"):
        scored([torch.ones(2), torch.tensor([1.0, float("nan")])], TopK(0.5))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.floats(0.001, 1.0), st.integers(0, 2**31))
def test_fact_8_exact_count_with_ties_to_the_lowest_index(sizes, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    # Five different scores, so that nearly all are tied.
    scores = [torch.randint(-2, 3, (n,), generator=generator).double() for n in sizes]
    masks = scored(scores, TopK(fraction))
    assert all(m.dtype == torch.bool and m.shape == s.shape for m, s in zip(masks, scores, strict=True))
    total = torch.cat(scores).tolist()
    ranked = sorted(range(len(total)), key=lambda i: (-total[i], i))[: max(1, round(fraction * len(total)))]
    assert torch.cat(masks).nonzero().flatten().tolist() == sorted(ranked)


def test_fact_8_all_tied():
    masks = scored([torch.zeros(2, 3), torch.zeros(4)], TopK(0.3))
    assert masks[0].tolist() == [[True, True, True], [False, False, False]]
    assert not masks[1].any()


def test_magnitude_keeps_the_largest_numbers_of_the_reference():
    parameters = [nn.Parameter(torch.tensor([0.1, -9.0, 3.0])), nn.Parameter(torch.tensor([[-4.0, 2.0]]))]
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters), mask=Magnitude(0.4))
    assert [m.tolist() for m in masks_of(optimizer)] == [[False, True, False], [[True, False]]]
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters), mask=Magnitude(0.6))
    assert [m.tolist() for m in masks_of(optimizer)] == [[False, True, True], [[True, False]]]


@given(st.integers(0, 1000), st.floats(0.01, 1.0))
def test_random_masks_are_exact_and_depend_on_the_seed_alone(seed, fraction):
    parameters = [nn.Parameter(torch.randn(9, 7)), nn.Parameter(torch.randn(41))]
    first, again, other = (Random(fraction, s).choose(parameters, None) for s in (seed, seed, seed + 1))
    assert sum(int(m.sum()) for m in first) == max(1, round(fraction * 104))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if 0.1 < fraction < 0.9:
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@given(st.data())
def test_random_masks_are_those_of_the_largest_draws(data):
    """Whatever is drawn: also ties, and what is far from uniform."""
    shapes = data.draw(
        st.lists(st.sampled_from([(), (0,), (5,), (3, 7), (40,)]), min_size=1).filter(lambda x: x != [(0,)] * len(x))
    )
    value = data.draw(st.sampled_from([st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.75]), st.just(0.5)]))
    draws = [
        torch.tensor(data.draw(st.lists(value, min_size=n, max_size=n)), dtype=torch.float64).view(shape)
        for shape in shapes
        for n in [torch.Size(shape).numel()]
    ]
    fraction, held = data.draw(st.floats(0.01, 1.0)), WeakSet()

    def draw(*_):
        for x in draws:
            held.add(fresh := x.clone())
            yield fresh
            assert len(held) <= 2, "one parameter's are held at a time, and the next while it is made"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Random, "_draws", draw)
        found = Random(fraction).choose([nn.Parameter(x.float()) for x in draws], None)
    n = sum(x.numel() for x in draws)
    assert_same_bits(found, kernels.top_k_masks(draws, max(1, round(fraction * n))))


@pytest.mark.parametrize("mask", [Random(0.1), Magnitude(0.1)])
def test_a_mask_of_nothing_is_refused(mask):
    for p in (nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(0))):
        with pytest.raises(ValueError, match="nothing to choose from: no parameter is trained"):
            MDGDOptimizer(torch.optim.SGD([p]), mask=mask)


def test_a_given_mask_is_checked_and_kept():
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
    masks = [torch.tensor([True, False, False]), torch.eye(2, dtype=torch.bool)]
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters), mask=Given(masks))
    assert_same_bits(masks_of(optimizer), masks)
    for bad, message in (
        (masks[:1], "1 masks for 2 trained parameters"),
        ([masks[0], masks[1].float()], "mask 1 is torch.float32"),
        ([masks[0], masks[1][0]], "mask 1"),
        ([torch.zeros_like(m) for m in masks], "nothing could be trained"),
    ):
        with pytest.raises(ValueError, match=message):
            MDGDOptimizer(torch.optim.SGD(parameters), mask=Given(bad))


def has_task_gradient(case):
    """Without one no mask is chosen."""
    return any(x is not None for x in case.gradients["task"])


@given(case=cases(F64), fraction=st.sampled_from([0.1, 0.5, 1.0]))
def test_the_mask_keeps_the_largest_similarities(case, fraction):
    assume(has_task_gradient(case))
    rows = [[flat([x], [p]) for x in row] for *row, p in zip(*case.kinds, case.parameters, strict=True)]
    scores = torch.cat([equations.similarity(*row) for row in rows])

    masks = torch.cat([m.reshape(-1) for m in chosen(case, TopK(fraction))])

    assert int(masks.sum()) == max(1, round(fraction * scores.numel()))
    # To rounding: the two sides add in another order.
    if not masks.all():
        assert scores[masks].min() >= scores[~masks].max() - 1e-12 * scores.abs().max()


def test_the_mask_of_the_first_step_is_the_top_by_task_gradient():
    case = make_case([(6, 5), (7,)], (torch.float32,) * 2, 0)
    g, zeros = case.gradients["task"], [torch.zeros_like(p) for p in case.parameters]
    case.gradients = {"task": g, "visual": zeros, "reference_task": g, "reference_visual": zeros}
    masks = torch.cat([m.reshape(-1) for m in chosen(case, TopK(0.2))])
    size = flat(g, case.parameters).abs()
    assert set(masks.nonzero().flatten().tolist()) == set(size.topk(round(0.2 * 37)).indices.tolist())


def test_tiny_gradients_do_not_underflow_into_ties():
    case = make_case([(40,)], (torch.float32,), 0)
    g = [case.gradients["task"][0] * 1e-30]
    zeros = [torch.zeros(40)]
    case.gradients = {"task": g, "visual": zeros, "reference_task": g, "reference_visual": zeros}
    (mask,) = chosen(case, TopK(0.25))
    assert set(mask.nonzero().flatten().tolist()) == set(g[0].abs().topk(10).indices.tolist())


@given(cases(), st.sampled_from([MDGD, Project]), WEIGHTS)
def test_every_masked_form_equals_the_flat_form(case, rule, align):
    assume(has_task_gradient(case))
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), rule(align), mask=TopK(0.4))
    optimizer.set_gradients(**case.gradients)
    optimizer.step()
    optimizer.zero_grad()
    masks = masks_of(optimizer)

    # Other gradients than those that chose the mask.
    case.gradients = {r: [None if x is None else x.flip(0) for x in row] for r, row in case.gradients.items()}
    optimizer.set_gradients(**case.gradients)
    optimizer.combine()

    wanted = expected(case.kinds, case.parameters, rule=rule.__name__, align=align, masks=masks)
    inputs = [[None if x is None else (2 + align) * x for x in kind] for kind in case.kinds]
    assert_close([p.grad for p in case.parameters], wanted, inputs)
    for p, mask in zip(case.parameters, masks, strict=True):
        assert p.grad is None or not p.grad[~mask].any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("base", BASES)
def test_fact_7_numbers_outside_the_mask_stay_bit_identical(base, rule):
    case = make_case([(6, 5), (7,), (3,)], (torch.float32, torch.float64, torch.float32), 0)
    optimizer = MDGDOptimizer(BASES[base](case.parameters), rule, mask=TopK(0.3))
    start = [bits(p).clone() for p in case.parameters]
    for sign in (1, -1, 1):
        optimizer.set_gradients(**{r: [sign * x for x in row] for r, row in case.gradients.items()})
        optimizer.step()
        optimizer.zero_grad()
    # Steps without captures too.
    for p in case.parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, x, mask in zip(case.parameters, start, masks_of(optimizer), strict=True):
        outside = ~mask.reshape(-1)
        assert torch.equal(bits(p)[outside], x[outside])
        assert bool((bits(p)[mask.reshape(-1)] != x[mask.reshape(-1)]).all())


@pytest.mark.parametrize("rule", RULES)
def test_fact_7_holds_for_momentum_left_from_an_earlier_mask(rule):
    case = make_case([(6, 5), (7,)], F64 * 2, 0)
    base = torch.optim.SGD(case.parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    plain = MDGDOptimizer(base, rule)
    plain.set_gradients(**case.gradients)
    plain.step()
    plain.zero_grad()
    assert all(base.state[p]["momentum_buffer"].all() for p in case.parameters)

    masked = MDGDOptimizer(base, rule, mask=TopK(0.3))
    start = [bits(p).clone() for p in case.parameters]
    for _ in range(2):
        masked.set_gradients(**case.gradients)
        masked.step()
        masked.zero_grad()
    for p, x, mask in zip(case.parameters, start, masks_of(masked), strict=True):
        assert torch.equal(bits(p)[~mask.reshape(-1)], x[~mask.reshape(-1)])


def test_fact_7_holds_for_zeros_with_a_sign():
    p = nn.Parameter(-torch.zeros(8))
    optimizer = MDGDOptimizer(torch.optim.AdamW([p], lr=0.1, weight_decay=0.5), mask=TopK(0.25))
    g, v = torch.arange(1.0, 9.0), torch.tensor([1.0, -1.0] * 4)
    for _ in range(2):
        optimizer.set_gradients(task=[g], visual=[v], reference_task=[g], reference_visual=[0 * v])
        optimizer.step()
        optimizer.zero_grad()
    (mask,) = masks_of(optimizer)
    assert p[~mask].signbit().all()


def test_the_mask_is_chosen_once():
    case = make_case([(30,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), mask=TopK(0.3))
    assert "kept_fraction" not in optimizer.diagnostics
    seen = []
    for factor in (1.0, torch.arange(30, dtype=torch.float64)):
        optimizer.set_gradients(**{r: [x * factor for x in row] for r, row in case.gradients.items()})
        optimizer.step()
        optimizer.zero_grad()
        seen.append(masks_of(optimizer)[0].clone())
    assert torch.equal(*seen)
    assert optimizer.diagnostics["kept_fraction"] == 0.3


def test_no_mask_before_the_first_captures():
    p = nn.Parameter(torch.ones(4))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.5), mask=TopK(0.25))
    p.grad = torch.ones(4)
    optimizer.step()
    assert p.tolist() == [0.5] * 4


def test_restore_outside_copies_bits():
    p, before = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-0.0, float("nan"), 5.0])
    restore_outside_([p], [before], [torch.tensor([False, False, True])])
    assert_same_bits([p], [torch.tensor([-0.0, float("nan"), 3.0])])


def test_a_mask_may_be_chosen_where_no_other_gradient_than_the_tasks_is_there():
    p = nn.Parameter(torch.zeros(4))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=1.0), mask=TopK(0.5))
    optimizer.set_gradients(task=[torch.ones(4)], visual=[None], reference_task=[None], reference_visual=[None])
    optimizer.step()
    # All scores are 0, and ties go to the lowest index.
    assert p.tolist() == [-1.0, -1.0, 0.0, 0.0]

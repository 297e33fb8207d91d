"""Capture, combine, step: what they take, what they refuse, and what they leave behind."""

import math

import pytest
import torch
from torch import nn

from tests.properties import assert_close, assert_same_bits, expected
from tests.strategies import ROLES, make_case
from torch_mdgd import MDGDOptimizer, TopK

F64 = (torch.float64,)
FOUR = {"update": "regularize"}
TWO = {"update": "project"}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def losses(model: nn.Sequential, target: torch.Tensor | None = None):
    """A visual and a task loss on fixed data."""
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
    z = model[0](x)
    visual = (z - (torch.full_like(z, 0.1) if target is None else target)).square().mean()
    return visual, (model(x) - 1).square().mean()


def sgd(model: nn.Module, **settings) -> MDGDOptimizer:
    return MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **settings)


def gradients(model: nn.Module, which: int):
    return list(torch.autograd.grad(losses(model)[which], list(model.parameters()), allow_unused=True))


def grads(model: nn.Module):
    return [p.grad for p in model.parameters()]


def capture_both(optimizer, model, **options):
    visual, task = losses(model)
    with optimizer.capture("visual", **options):
        visual.backward(retain_graph=True)
    with optimizer.capture("task", **options):
        task.backward()


# Capture.


def test_captured_passes_equal_gradients_given():
    model = network()
    optimizer = sgd(model, **FOUR)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    at_reference = network()
    roles = [gradients(m, which) for m in (model, at_reference) for which in (1, 0)]
    with optimizer.reference():
        capture_both(optimizer, model)
    capture_both(optimizer, model)
    optimizer.combine()
    assert_close(grads(model), expected(roles, list(model.parameters())))


def test_capture_leaves_no_gradient_behind():
    model = network()
    optimizer = sgd(model)
    capture_both(optimizer, model)
    assert all(g is None for g in grads(model))


def test_micro_batches_add_up_to_the_full_batch():
    data = torch.linspace(-2, 2, 32, dtype=torch.float64).view(8, 4)
    outcomes = []
    for parts in (1, 4):
        model = network()
        optimizer = sgd(model, **TWO)
        for x in data.chunk(parts):
            with optimizer.capture("task"):
                (model(x) - 1).square().sum().backward()
            with optimizer.capture("visual"):
                model[0](x).square().sum().backward()
        optimizer.combine()
        outcomes.append(grads(model))
    assert_close(outcomes[1], outcomes[0])


def test_set_gradients_adds_up_and_copies():
    case = make_case([(2, 3)], F64, 0)
    (p,) = case.parameters
    g, v = case.gradients["task"][0], case.gradients["visual"][0]
    kept = g.clone()
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=1.0), **TWO)
    optimizer.set_gradients(task=[g], visual=[v])
    optimizer.set_gradients(task=[None], visual=[v])
    optimizer.set_gradients(task=[g])
    optimizer.combine()
    assert_close([p.grad], expected([[2 * g], [2 * v], [None], [None]], [p], update="project"))
    assert_same_bits([g], [kept])


def test_set_gradients_adds_to_captures():
    model = network()
    optimizer = sgd(model, **TWO)
    task, visual = gradients(model, 1), gradients(model, 0)
    capture_both(optimizer, model)
    optimizer.set_gradients(task=task, visual=visual)
    optimizer.combine()
    double = [[None if x is None else 2 * x for x in role] for role in (task, visual)]
    nothing = [None] * len(task)
    assert_close(grads(model), expected([*double, nothing, nothing], list(model.parameters()), update="project"))


def test_nested_capture_is_refused_and_discards():
    model = network()
    optimizer = sgd(model, **TWO)
    outer, inner = optimizer.capture("task"), optimizer.capture("visual")
    with pytest.raises(RuntimeError, match="already inside another capture"), outer, inner:
        pass
    with pytest.raises(RuntimeError, match="not captured"):
        optimizer.combine()
    capture_both(optimizer, model)
    optimizer.step()


def test_unknown_role_is_refused():
    with pytest.raises(ValueError, match="'reference_task'"):
        sgd(network()).capture("reference_task")


def test_exception_inside_capture_discards_the_step():
    model = network()
    optimizer = sgd(model, **TWO)

    def fails():
        with optimizer.capture("task"):
            task.backward()
            raise ZeroDivisionError

    visual, task = losses(model)
    with optimizer.capture("visual"):
        visual.backward(retain_graph=True)
    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(g is None for g in grads(model))
    with pytest.raises(RuntimeError, match="task and visual gradients, not captured"):
        optimizer.combine()


def test_capture_without_any_gradient_is_refused():
    model = network()
    optimizer = sgd(model)
    empty = optimizer.capture("task")
    with pytest.raises(RuntimeError, match="capture of task: no parameter received a gradient"), empty:
        pass


def test_stray_gradient_before_the_first_capture_is_refused():
    model = network()
    optimizer = sgd(model)
    losses(model)[1].backward()
    with pytest.raises(RuntimeError, match="parameter 0 already has a gradient"), optimizer.capture("visual"):
        pass
    with pytest.raises(RuntimeError, match="parameter 0 already has a gradient"):
        optimizer.set_gradients(task=gradients(model, 1))


def test_stray_gradient_between_captures_is_refused():
    model = network()
    optimizer = sgd(model, **TWO)
    visual, task = losses(model)
    with optimizer.capture("visual"):
        visual.backward(retain_graph=True)
    task.backward()
    with pytest.raises(RuntimeError, match="parameter 0 already has a gradient"), optimizer.capture("task"):
        pass


@pytest.mark.parametrize("verb", ["combine", "step"])
def test_stray_gradient_after_the_captures_is_refused(verb):
    model = network()
    optimizer = sgd(model, **TWO)
    capture_both(optimizer, model)
    losses(model)[1].backward()
    with pytest.raises(RuntimeError, match="parameter 0 already has a gradient"):
        getattr(optimizer, verb)()


def test_zeroed_gradients_are_not_stray():
    model = network()
    optimizer = sgd(model, **TWO)
    for _ in range(2):
        capture_both(optimizer, model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads(model))


def test_forgotten_zero_grad_is_refused():
    model = network()
    optimizer = sgd(model, **TWO)
    capture_both(optimizer, model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="zero_grad"):
        capture_both(optimizer, model)


def test_sparse_gradient_is_refused_by_position():
    table = nn.Embedding(5, 2, sparse=True)
    dense = nn.Parameter(torch.ones(2))
    optimizer = MDGDOptimizer(torch.optim.SGD([dense, table.weight], lr=0.1))
    with pytest.raises(ValueError, match="task gradient of parameter 1 is sparse"), optimizer.capture("task"):
        (table(torch.tensor([1, 3])) * dense).sum().backward()


def test_complex_gradient_is_refused_by_position():
    optimizer = MDGDOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1))
    with pytest.raises(ValueError, match="visual gradient of parameter 0 is complex"):
        optimizer.set_gradients(visual=[torch.ones(2, dtype=torch.complex64)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.ones(3)], "reference_task gradients: 1 entries for 2 parameters"),
        (
            [torch.ones(3), torch.ones(3)],
            r"reference_task gradient of parameter 1 has shape \(3,\), the parameter \(2,\)",
        ),
    ],
)
def test_set_gradients_checks_sizes_and_takes_all_or_nothing(given, message):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1))
    good = [torch.ones(3), torch.ones(2)]
    with pytest.raises(ValueError, match=message):
        optimizer.set_gradients(task=good, visual=good, reference_task=given, reference_visual=good)
    with pytest.raises(RuntimeError, match="needs the task and visual and reference_task and reference_visual"):
        optimizer.combine()


def test_loss_scales_must_agree_within_a_step():
    model = network()
    optimizer = sgd(model, **TWO)
    visual, task = losses(model)
    with optimizer.capture("visual", scale=1024.0):
        (1024 * visual).backward(retain_graph=True)
    unscaled = optimizer.capture("task")
    with pytest.raises(ValueError, match=r"capture of task: loss scale 1\.0 differs from 1024\.0"), unscaled:
        task.backward()
    with optimizer.capture("task", scale=1024.0):
        (1024 * task).backward()
    optimizer.step()
    optimizer.zero_grad()
    # The next step is free to have another.
    capture_both(optimizer, model, scale=512.0)


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model = Tied().double()
    optimizer = sgd(model, **TWO)
    assert len(optimizer.parameters) == 1
    tokens = torch.tensor([0, 2, 5])
    task, visual = lambda: model(tokens).logsumexp(1).sum(), lambda: model.embed(tokens).sin().sum()
    g, v = (torch.autograd.grad(f(), [model.embed.weight])[0] for f in (task, visual))
    start = model.embed.weight.detach().clone()
    with torch.no_grad():
        model.embed.weight.add_(0.5)
    with optimizer.reference():
        assert_same_bits([model.head.weight], [start])
        with optimizer.capture("visual"):
            visual().backward()
        with optimizer.capture("task"):
            task().backward()
    with torch.no_grad():
        model.embed.weight.sub_(0.5)
    for role, f in (("visual", visual), ("task", task)):
        with optimizer.capture(role):
            f().backward()
    optimizer.combine()
    assert_close([model.embed.weight.grad], expected([[g], [v], [g], [v]], [model.embed.weight], update="project"))


# Combine.


@pytest.mark.parametrize("lacking", ROLES)
def test_a_missing_capture_is_named(lacking):
    case = make_case([(3,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), **FOUR)
    optimizer.set_gradients(**{role: row for role, row in case.gradients.items() if role != lacking})
    with pytest.raises(RuntimeError, match=f"needs the {lacking} gradient, not captured"):
        optimizer.combine()


@pytest.mark.parametrize("verb", ["combine", "step"])
def test_capturing_one_role_alone_is_refused(verb):
    model = network()
    optimizer = sgd(model, **TWO)
    with optimizer.capture("task"):
        losses(model)[1].backward()
    with pytest.raises(RuntimeError, match="needs the visual gradient"):
        getattr(optimizer, verb)()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, 4),
        ({"regularize": 0.0}, 2),
        ({"update": "reference"}, 4),
        ({"update": "reference", "regularize": 0.0}, 4),
        ({"update": "project"}, 2),
        ({"update": "project", "space": "step"}, 2),
        ({"update": "project", "mask": TopK(0.5)}, 4),
        ({"mask": TopK(0.5)}, 4),
    ],
)
def test_required_roles_before_the_first_step(settings, wanted):
    assert len(sgd(network(), **settings).required_roles) == wanted


@pytest.mark.parametrize(("settings", "wanted"), [({}, 2), ({"update": "reference"}, 4), ({"update": "project"}, 2)])
def test_required_roles_once_the_mask_is_chosen(settings, wanted):
    case = make_case([(9,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), mask=TopK(0.5), **settings)
    optimizer.set_gradients(**case.gradients)
    optimizer.step()
    assert len(optimizer.required_roles) == wanted


def test_any_group_that_needs_the_reference_makes_all_four_required():
    case = make_case([(9,), (4,)], F64 * 2, 0)
    a, b = case.parameters
    base = torch.optim.SGD([{"params": [a]}, {"params": [b], "update": "regularize"}], lr=0.1)
    assert len(MDGDOptimizer(base, update="project").required_roles) == 4


def test_combine_then_step_equals_step():
    models = network(), network()
    for model, both in zip(models, (True, False), strict=True):
        optimizer = sgd(model, **TWO)
        capture_both(optimizer, model)
        if both:
            optimizer.combine()
        optimizer.step()
    assert_same_bits(list(models[0].parameters()), list(models[1].parameters()))


def test_reducing_the_reference_early_changes_nothing():
    case = make_case([(3, 4), (5,)], F64 * 2, 0)
    outcomes = []
    for early in (True, False):
        optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), **FOUR)
        optimizer.set_gradients(reference_task=case.gradients["reference_task"])
        optimizer.set_gradients(reference_visual=case.gradients["reference_visual"])
        if early:
            optimizer.reduce_reference()
            optimizer.reduce_reference()
        optimizer.set_gradients(task=case.gradients["task"], visual=case.gradients["visual"])
        optimizer.combine()
        outcomes.append([p.grad for p in case.parameters])
        optimizer.zero_grad()
    assert_same_bits(*outcomes)


def test_nothing_is_captured_at_the_reference_after_it_is_reduced():
    model = network()
    optimizer = sgd(model)
    with optimizer.reference():
        capture_both(optimizer, model)
    optimizer.reduce_reference()
    with pytest.raises(RuntimeError, match="closed the reference's roles"), optimizer.reference():
        capture_both(optimizer, model)


def test_reducing_without_captures_is_refused():
    optimizer = sgd(network())
    with pytest.raises(RuntimeError, match="reference_task and reference_visual gradients, not captured"):
        optimizer.reduce_reference()


def test_combining_reuses_the_memory_of_the_task_gradient():
    case = make_case([(3, 4)], F64, 0)
    (p,) = case.parameters
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.1), **TWO)
    with optimizer.capture("visual"):
        (p * case.gradients["visual"][0]).sum().backward()
    with optimizer.capture("task"):
        (p * case.gradients["task"][0]).sum().backward()
        address = p.grad.data_ptr()
    optimizer.combine()
    assert p.grad.data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_has_the_dtype_of_its_parameter(dtype):
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.1), **TWO)
    g, v = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    optimizer.set_gradients(task=[g], visual=[v])
    optimizer.combine()
    assert p.grad.dtype == dtype
    assert p.grad.tolist() == [1 - 2.5 + 1, 2, 3, 4 - 2.5 + 1]


# Step.


@pytest.mark.parametrize("settings", [FOUR, TWO, {"update": "project", "space": "step", "restore": 0.1}])
def test_step_with_nothing_captured_is_the_wrapped_step(settings):
    models = network(), network()
    plain = torch.optim.AdamW(models[0].parameters(), lr=0.1)
    wrapped = MDGDOptimizer(torch.optim.AdamW(models[1].parameters(), lr=0.1), **settings)
    for _ in range(3):
        for model, optimizer in zip(models, (plain, wrapped), strict=True):
            optimizer.zero_grad()
            losses(model)[1].backward()
            optimizer.step()
    assert_same_bits(list(models[0].parameters()), list(models[1].parameters()))


def test_nothing_of_one_step_reaches_the_next():
    model, twin = network(), network()
    optimizer = sgd(model, update="project", space="step")
    capture_both(optimizer, model)
    optimizer.step()
    # Not the wrapper's zero_grad: a trainer calls the model's.
    model.zero_grad()
    twin.load_state_dict(model.state_dict())
    losses(model)[1].backward()
    optimizer.step()
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    losses(twin)[1].backward()
    plain.step()
    assert_same_bits(list(model.parameters()), list(twin.parameters()))


def test_zero_grad_forgets_what_was_combined():
    model, twin = network(), network()
    optimizer = sgd(model, update="project", space="step", restore=0.5)
    capture_both(optimizer, model)
    optimizer.combine()
    optimizer.zero_grad()
    losses(model)[1].backward()
    optimizer.step()
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    losses(twin)[1].backward()
    plain.step()
    assert_same_bits(list(model.parameters()), list(twin.parameters()))


def test_zero_grad_forgets_captures():
    model = network()
    optimizer = sgd(model, **TWO)
    capture_both(optimizer, model)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="not captured"):
        optimizer.combine()


def test_nan_when_the_mask_is_chosen_refuses_the_step_and_changes_nothing():
    case = make_case([(3, 4), (5,)], F64 * 2, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), mask=TopK(0.5))
    before = [p.detach().clone() for p in case.parameters]
    bad = {role: [x.clone() for x in row] for role, row in case.gradients.items()}
    bad["visual"][1][2] = math.nan
    optimizer.set_gradients(**bad)
    with pytest.raises(RuntimeError, match="NaN or Inf at the step that chooses the mask"):
        optimizer.step()
    assert_same_bits(case.parameters, before)
    assert not case.parameters[1].grad.isfinite().all()
    optimizer.zero_grad()
    optimizer.set_gradients(**case.gradients)
    optimizer.step()
    assert optimizer.diagnostics["kept_fraction"] == round(0.5 * 17) / 17


VERBS = {
    "combine": lambda o: o.combine(),
    "step": lambda o: o.step(),
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict(o.base.state_dict()),
    "add_param_group": lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
}


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_else_may_happen_at_the_reference(verb):
    model = network()
    optimizer = sgd(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    now = model[0].weight.detach().clone()
    with (
        pytest.raises(RuntimeError, match=f"{verb}: leave capture\\(\\) and reference\\(\\) first"),
        optimizer.reference(),
    ):
        VERBS[verb](optimizer)
    assert_same_bits([model[0].weight], [now])


@pytest.mark.parametrize("verb", ["combine", "step"])
def test_no_step_inside_a_capture(verb):
    model = network()
    optimizer = sgd(model)
    start = model[0].weight.detach().clone()
    with optimizer.capture("task"):
        losses(model)[1].backward()
        with pytest.raises(RuntimeError, match=f"{verb}: leave capture"):
            VERBS[verb](optimizer)
    assert_same_bits([model[0].weight], [start])


def test_no_reference_inside_a_capture_or_a_reference():
    model = network()
    optimizer = sgd(model)
    with pytest.raises(RuntimeError, match="already inside"), optimizer.capture("task"), optimizer.reference():
        pass
    with pytest.raises(RuntimeError, match="already inside"), optimizer.reference(), optimizer.reference():
        pass


# Construction and groups.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update": "plain"}, "update must be one of 'regularize', 'reference', 'project', got 'plain'"),
        ({"space": "time"}, "space must be one of"),
        ({"scope": "row"}, "scope must be one of"),
        ({"align": -1.0}, "align must be a finite number ≥ 0"),
        ({"regularize": math.nan}, "regularize must be a finite number ≥ 0"),
        ({"restore": math.inf, "space": "step", "update": "project"}, "restore must be a finite number ≥ 0"),
        ({"align": "1"}, "align must be a finite number ≥ 0"),
        ({"space": "step"}, "space='step' works with update='project' alone"),
        ({"restore": 0.1}, "restore is a move in step space"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sgd(network(), **settings)


def test_settings_live_in_the_groups_and_a_group_may_have_its_own():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([{"params": [a]}, {"params": [b], "align": 0.25, "scope": "global"}], lr=0.1)
    optimizer = MDGDOptimizer(base, align=2.0, regularize=0.5)
    found = [(g["align"], g["regularize"], g["scope"], g["update"]) for g in optimizer.param_groups]
    assert found == [(2.0, 0.5, "tensor", "regularize"), (0.25, 0.5, "global", "regularize")]


def test_a_bad_setting_in_a_group_is_refused():
    base = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "align": -1.0}], lr=0.1)
    with pytest.raises(ValueError, match="align"):
        MDGDOptimizer(base)


def test_the_same_parameter_twice_is_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate"):
        base = torch.optim.SGD([p, p], lr=0.1)
    with pytest.raises(ValueError, match="more than once"):
        MDGDOptimizer(base)


def test_changing_a_setting_in_a_group_takes_effect():
    case = make_case([(5,)], F64, 0)
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1))
    optimizer.param_groups[0]["align"] = 0.125
    optimizer.set_gradients(**case.gradients)
    optimizer.combine()
    assert_close([case.parameters[0].grad], expected(case.roles, case.parameters, align=0.125))


def test_add_param_group_takes_this_optimizers_settings_and_a_reference():
    case = make_case([(3,), (4,)], F64 * 2, 0)
    a, b = case.parameters
    optimizer = MDGDOptimizer(torch.optim.SGD([a], lr=0.1), align=0.5)
    with torch.no_grad():
        a.add_(1)
    now = b.detach().clone()
    optimizer.add_param_group({"params": iter([b]), "regularize": 2.0})
    with torch.no_grad():
        b.add_(1)
    with optimizer.reference():
        assert_same_bits([b], [now])
    optimizer.set_gradients(**case.gradients)
    optimizer.combine()
    wanted = [
        *expected([role[:1] for role in case.roles], [a], align=0.5),
        *expected([role[1:] for role in case.roles], [b], align=0.5, regularize=2.0),
    ]
    assert_close([a.grad, b.grad], wanted)


def test_add_param_group_with_a_bad_setting_adds_nothing():
    optimizer = sgd(network())
    with pytest.raises(ValueError, match="align"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "align": -1})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.parameters) == 4


USES = {
    "capture": lambda o: o.capture("task"),
    "reference": lambda o: o.reference().__enter__(),
    "required_roles": lambda o: o.required_roles,
    "set_gradients": lambda o: o.set_gradients(task=[None] * 5),
    "state_dict": lambda o: o.state_dict(),
    "step": lambda o: o.step(),
}


@pytest.mark.parametrize("use", USES)
def test_a_group_added_to_the_base_is_noticed(use):
    optimizer = sgd(network(), **TWO)
    optimizer.base.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="call add_param_group on the MDGDOptimizer, not on its base"):
        USES[use](optimizer)


@pytest.mark.parametrize("when", ["captured", "combined", "masked"])
def test_add_param_group_comes_before_captures_and_masks(when):
    case = make_case([(5,)], F64, 0)
    mask = TopK(0.5) if when == "masked" else None
    optimizer = MDGDOptimizer(torch.optim.SGD(case.parameters, lr=0.1), update="project", space="step", mask=mask)
    optimizer.set_gradients(**case.gradients)
    if when == "combined":
        optimizer.combine()
    if when == "masked":
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"add_param_group: .*; add groups before"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_frozen_parameters_in_a_group_stay_as_they_are():
    model = network()
    model[2].weight.requires_grad_(False)
    start = model[2].weight.detach().clone()
    optimizer = sgd(model, **TWO)
    capture_both(optimizer, model)
    optimizer.step()
    assert model[2].weight.grad is None
    assert_same_bits([model[2].weight], [start])

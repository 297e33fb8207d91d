"""The contract of an optimizer: all that torch and its users do with one works on the wrapper."""

import copy
import inspect
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.properties import assert_close, assert_same_bits
from tests.strategies import ROLES, make_case
from torch_mdgd import MDGDOptimizer, TopK

TORCH_OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
STEPPING = [name for name in TORCH_OPTIMIZERS if name != "LBFGS"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))


def loss_of(model) -> torch.Tensor:
    x = torch.linspace(-1, 1, 24).view(6, 4)
    return (model(x) - 1).square().mean()


def visual_loss_of(model) -> torch.Tensor:
    x = torch.linspace(-1, 1, 24).view(6, 4)
    return (model[0](x) - 0.3).abs().mean()


def capture_both(model, optimizer, scaler=None):
    scale = 1.0 if scaler is None else scaler.get_scale()
    for role, loss in (("task", loss_of(model)), ("visual", visual_loss_of(model))):
        with optimizer.capture(role, scale=scale):
            (loss if scaler is None else scaler.scale(loss)).backward()


def plain_step(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def side_by_side(make, steps=3, schedule=None, on_base=False, **settings):
    """Train one model with the plain optimizer and one with the wrapped; schedule(optimizer) gives a callback."""
    outcomes = []
    for wrap in (False, True):
        model = network()
        base = make(model.parameters())
        optimizer = MDGDOptimizer(base, **settings) if wrap else base
        after = schedule(base if on_base else optimizer) if schedule else lambda: None
        rates = []
        for _ in range(steps):
            plain_step(model, optimizer)
            after()
            rates.append([dict(group, params=None) for group in base.param_groups])
        outcomes.append((list(model.parameters()), [[g["lr"] for g in groups] for groups in rates], rates))
    return outcomes


# Every optimizer of torch.


@pytest.mark.parametrize("name", [name for name in STEPPING if name != "SparseAdam"])
def test_nothing_captured_steps_exactly_as_the_wrapped_optimizer(name):
    plain, wrapped = side_by_side(lambda p: TORCH_OPTIMIZERS[name](p, lr=0.01))
    assert_same_bits(wrapped[0], plain[0])


def test_sparse_gradients_pass_through_when_nothing_is_captured():
    outcomes = []
    for wrap in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=True)
        optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
        optimizer = MDGDOptimizer(optimizer) if wrap else optimizer
        for _ in range(2):
            optimizer.zero_grad()
            table(torch.tensor([1, 4])).square().sum().backward()
            optimizer.step()
        outcomes.append([table.weight])
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("name", [name for name in STEPPING if name != "SparseAdam"])
def test_every_optimizer_gets_the_combined_gradient(name):
    case = make_case([(3, 4), (5, 2)], (torch.float32,) * 2, 0)
    twins = [nn.Parameter(p.detach().clone()) for p in case.parameters]
    plain = TORCH_OPTIMIZERS[name](twins, lr=0.01)
    wrapped = MDGDOptimizer(TORCH_OPTIMIZERS[name](case.parameters, lr=0.01))
    for _ in range(2):
        wrapped.set_gradients(**case.gradients)
        wrapped.combine()
        for twin, p in zip(twins, case.parameters, strict=True):
            twin.grad = p.grad.clone()
        wrapped.step()
        wrapped.zero_grad()
        plain.step()
    assert_same_bits(case.parameters, twins)


def test_lbfgs_is_refused():
    with pytest.raises(TypeError, match="LBFGS evaluates its closure several times"):
        MDGDOptimizer(torch.optim.LBFGS(network().parameters()))


def test_only_an_optimizer_can_be_wrapped_and_only_once():
    model = network()
    with pytest.raises(TypeError, match=r"base must be a torch\.optim\.Optimizer, got list"):
        MDGDOptimizer(list(model.parameters()))
    with pytest.raises(TypeError, match="wrapped already"):
        MDGDOptimizer(MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1)))


# What is forwarded and what is not.


def test_groups_state_and_defaults_are_those_of_base():
    optimizer = MDGDOptimizer(torch.optim.AdamW(network().parameters(), lr=0.25))
    base = optimizer.base
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert optimizer.defaults["lr"] == 0.25
    for name in ("param_groups", "state", "defaults"):
        value = copy.copy(getattr(base, name))
        setattr(optimizer, name, value)
        assert getattr(base, name) is value
        assert name not in vars(optimizer)


def test_replaced_parameters_are_followed():
    # As sharding does: the groups keep, the tensors in them change.
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), update="project")
    new = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer.param_groups[0]["params"] = new
    g = [torch.ones_like(p) for p in new]
    optimizer.set_gradients(task=g, visual=[None, None])
    optimizer.step()
    for p, old in zip(new, model.parameters(), strict=True):
        assert torch.equal(p, old - 1)


def test_nothing_else_of_base_shows_through():
    optimizer = MDGDOptimizer(torch.optim.AdamW(network().parameters(), lr=0.1, fused=True))
    assert optimizer.base._step_supports_amp_scaling
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def test_repr_shows_the_groups():
    text = repr(MDGDOptimizer(torch.optim.SGD(network().parameters(), lr=0.25)))
    assert text.startswith("MDGDOptimizer (")
    assert "lr: 0.25" in text
    assert "update: regularize" in text


# Schedulers.

SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8, cycle_momentum=True),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
}


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_work_on_the_wrapper_and_on_base_without_warnings(name, kind, on_base):
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, wrapped = side_by_side(make, 6, lambda o: SCHEDULES[name](o).step, on_base)
    assert len({tuple(row) for row in plain[1]}) > 1
    assert wrapped[1] == plain[1]
    if name in ("OneCycleLR", "CyclicLR"):
        key = "momentum" if kind == "sgd" else "betas"
        cycled = [[groups[0][key] for groups in outcome[2]] for outcome in (plain, wrapped)]
        assert cycled[0] == cycled[1]
        assert len(set(cycled[0])) > 1
    assert_same_bits(wrapped[0], plain[0])


@pytest.mark.parametrize("on_base", [False, True])
def test_reduce_on_plateau(on_base):
    def schedule(optimizer):
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.1)
        return lambda: scheduler.step(1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, wrapped = side_by_side(lambda p: torch.optim.SGD(p, lr=0.1), 5, schedule, on_base)
    assert len({tuple(row) for row in plain[1]}) > 1
    assert wrapped[1] == plain[1]
    assert_same_bits(wrapped[0], plain[0])


def test_a_scheduler_before_the_first_step_still_warns():
    # The wrapper must not hide the mistake that torch looks for.
    optimizer = MDGDOptimizer(torch.optim.SGD(network().parameters(), lr=0.1))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_schedulers_work_with_captures():
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), update="project")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
        seen = []
        for _ in range(3):
            capture_both(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            seen.append(model[0].weight.detach().clone())
    assert not torch.equal(seen[0], network()[0].weight)
    assert_same_bits(seen[1:], [seen[0]] * 2)


# Hooks.


def test_step_hooks_run_once_and_in_order():
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), update="project")
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o)))
    optimizer.base.register_step_pre_hook(lambda o, args, kwargs: seen.append(("base pre", o)))
    optimizer.base.register_step_post_hook(lambda o, args, kwargs: seen.append(("base post", o)))
    capture_both(model, optimizer)
    optimizer.step()
    wanted = [("pre", optimizer), ("base pre", optimizer.base), ("base post", optimizer.base), ("post", optimizer)]
    assert seen == wanted


def test_global_step_hooks_fire_for_the_wrapper_and_for_base():
    optimizer = MDGDOptimizer(torch.optim.SGD(network().parameters(), lr=0.1))
    seen = []
    handle = register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(o))
    try:
        optimizer.step()
    finally:
        handle.remove()
    assert seen == [optimizer.base, optimizer]


def test_state_dict_hooks_run_once_and_may_replace():
    optimizer = MDGDOptimizer(torch.optim.SGD(network().parameters(), lr=0.1))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append("post") or {**s, "note": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, s: seen.append("load pre") or {k: v for k, v in s.items() if k != "note"}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    optimizer.base.register_load_state_dict_pre_hook(lambda o, s: seen.append(sorted(s)))
    state = optimizer.state_dict()
    assert state["note"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["pre", "post", "load pre", ["param_groups", "state"], "load post"]


def test_a_hook_that_changes_the_state_dict_in_place_does_not_change_the_callers():
    optimizer = MDGDOptimizer(torch.optim.SGD(network().parameters(), lr=0.1))
    state = {**optimizer.state_dict(), "note": 1}

    def drop(o, s):
        del s["note"]

    optimizer.register_load_state_dict_pre_hook(drop)
    optimizer.load_state_dict(state)
    assert state["note"] == 1


# Closures.


@pytest.mark.parametrize("space", ["gradient", "step"])
@pytest.mark.parametrize("captured", [False, True])
def test_a_closure_runs_once_with_gradients_enabled(captured, space):
    outcomes = []
    for as_closure in (False, True):
        model = network()
        optimizer = MDGDOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), update="project", space=space)
        calls = []

        def closure(model=model, optimizer=optimizer, calls=calls):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            if captured:
                capture_both(model, optimizer)
            else:
                loss_of(model).backward()
            return loss_of(model).detach()

        with torch.no_grad() if as_closure else torch.enable_grad():
            if as_closure:
                returned = optimizer.step(closure)
                assert calls == [True]
                assert torch.equal(returned, loss_of(network()))
            else:
                closure()
                assert optimizer.step() is None
        outcomes.append(list(model.parameters()))
    assert_same_bits(*outcomes)


def test_an_exception_in_a_closure_steps_nothing():
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_same_bits(list(model.parameters()), list(network().parameters()))


# Copies.

FORMS = {
    "regularize": {},
    "project": {"update": "project", "align": 0.5},
    "step": {"update": "project", "space": "step", "restore": 0.1},
    "masked": {"mask": TopK(0.3)},
}


def trained(form, steps=2):
    model = network()
    optimizer = MDGDOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), **form)
    for _ in range(steps):
        step_with_captures(model, optimizer)
    return model, optimizer


def step_with_captures(model, optimizer):
    if len(optimizer.required_roles) == 4:
        with optimizer.reference():
            capture_both(model, optimizer)
    capture_both(model, optimizer)
    optimizer.step()
    optimizer.zero_grad()


def through_pickle(x):
    return pickle.loads(pickle.dumps(x))


def through_torch(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("name", FORMS)
def test_copies_go_on_as_the_original(name, duplicate):
    model, optimizer = trained(FORMS[name])
    optimizer.register_step_pre_hook(lambda o, args, kwargs: None)
    # Leaves a patched step on the instance, which must not follow into the copy.
    lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    twin, copied = duplicate((model, optimizer))
    assert isinstance(copied, MDGDOptimizer)
    assert copied.parameters[0] is twin[0].weight
    assert copied.parameters[0] is not model[0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for m, o in ((model, optimizer), (twin, copied)):
            step_with_captures(m, o)
            step_with_captures(m, o)
    assert_same_bits(list(twin.parameters()), list(model.parameters()))
    assert not torch.equal(twin[0].weight, network()[0].weight)
    copied.register_step_pre_hook(lambda o, args, kwargs: None)
    copied.state_dict()


def test_a_copy_between_captures_keeps_them():
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), update="project")
    capture_both(model, optimizer)
    twin, copied = copy.deepcopy((model, optimizer))
    optimizer.step()
    copied.step()
    assert_same_bits(list(twin.parameters()), list(model.parameters()))


# Gradient scaler, on the CPU, which has the same logic.


def scaled_run(base, form, steps=3, scaler=None, clip=None):
    model = network()
    optimizer = MDGDOptimizer(base(model.parameters()), **form)
    for _ in range(steps):
        if len(optimizer.required_roles) == 4:
            with optimizer.reference():
                capture_both(model, optimizer, scaler)
        capture_both(model, optimizer, scaler)
        if scaler is None:
            if clip:
                optimizer.combine()
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        else:
            optimizer.combine()
            scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return list(model.parameters())


BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("base", BASES)
def test_a_gradient_scaler_changes_nothing(base, name, clip):
    # Scales that are powers of two round nothing away in float32.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    wanted = scaled_run(BASES[base], FORMS[name], clip=clip)
    actual = scaled_run(BASES[base], FORMS[name], clip=clip, scaler=scaler)
    assert scaler.get_scale() == 2.0**13
    assert_close(actual, [p.detach().double() for p in wanted])


def test_a_scaler_that_steps_without_unscale_first():
    model, twin = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for m, s in ((model, scaler), (twin, None)):
        optimizer = MDGDOptimizer(torch.optim.AdamW(m.parameters(), lr=0.1, fused=True), update="project")
        capture_both(m, optimizer, s)
        optimizer.combine()
        if s is None:
            optimizer.step()
        else:
            s.step(optimizer)
    assert_close(list(model.parameters()), [p.detach().double() for p in twin.parameters()])


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", FORMS)
def test_an_inf_in_any_gradient_skips_the_step_and_loses_nothing(name, role, value):
    case = make_case([(3, 4), (5, 2)], (torch.float32,) * 2, 0)
    twins = [nn.Parameter(p.detach().clone()) for p in case.parameters]
    bad = {r: [x.clone() for x in row] for r, row in case.gradients.items()}
    bad[role][1][0, 0] = value
    base = lambda p: torch.optim.AdamW(p, lr=0.1)  # noqa: E731

    optimizer, plain = MDGDOptimizer(base(case.parameters), **FORMS[name]), MDGDOptimizer(base(twins), **FORMS[name])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for gradients in (case.gradients, bad, case.gradients):
        optimizer.set_gradients(**{r: [scaler.scale(x) for x in row] for r, row in gradients.items()})
        optimizer.combine()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if gradients is not bad:
            plain.set_gradients(**gradients)
            plain.step()
            plain.zero_grad()
    assert scaler.get_scale() == 1.0
    assert_close(case.parameters, [p.detach().double() for p in twins])


def test_an_inf_at_the_step_that_chooses_the_mask_is_skipped_and_the_next_step_chooses():
    case = make_case([(3, 4), (5, 2)], (torch.float32,) * 2, 0)
    start = [p.detach().clone() for p in case.parameters]
    bad = {r: [x.clone() for x in row] for r, row in case.gradients.items()}
    bad["reference_task"][0][0, 0] = math.inf
    optimizer = MDGDOptimizer(torch.optim.AdamW(case.parameters, lr=0.1), mask=TopK(0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    for gradients in (bad, case.gradients):
        assert "kept_fraction" not in optimizer.diagnostics
        optimizer.set_gradients(**gradients)
        optimizer.combine()
        scaler.step(optimizer)
        scaler.update()
        # Not the wrapper's zero_grad: a trainer calls the model's.
        for p in case.parameters:
            p.grad = None
        if gradients is bad:
            assert_same_bits(case.parameters, start)
    assert optimizer.diagnostics["kept_fraction"] == 0.5


def test_clipping_acts_on_the_combined_gradient():
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), update="project")
    start = [p.detach().clone() for p in model.parameters()]
    capture_both(model, optimizer)
    optimizer.combine()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    moved = torch.cat([(p.detach() - x).reshape(-1) for p, x in zip(model.parameters(), start, strict=True)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)

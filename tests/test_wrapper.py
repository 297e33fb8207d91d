"""The contract of an optimizer: all that torch and its users do with one works on the wrapper."""

import copy
import inspect
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests import networks
from tests.networks import capture_both, capture_needed, losses
from tests.properties import assert_same_bits
from tests.strategies import make_case
from torch_mdgd import MDGDOptimizer, Project, StepProject, TopK

TORCH_OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
STEPPING = [name for name in TORCH_OPTIMIZERS if name != "LBFGS"]


network = partial(networks.network, torch.float32, bias=False)


def loss_of(model):
    return losses(model)[1]


def plain_step(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


# Every optimizer of torch.


@pytest.mark.parametrize("name", [name for name in STEPPING if name != "SparseAdam"])
def test_nothing_captured_steps_exactly_as_the_wrapped_optimizer(name):
    outcomes = []
    for wrap in (False, True):
        model = network()
        optimizer = TORCH_OPTIMIZERS[name](model.parameters(), lr=0.01)
        optimizer = MDGDOptimizer(optimizer) if wrap else optimizer
        for _ in range(3):
            plain_step(model, optimizer)
        outcomes.append(list(model.parameters()))
    assert_same_bits(*outcomes)


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
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), Project())
    capture_both(model, optimizer)
    optimizer.step()
    optimizer.zero_grad()
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
    assert "mdgd_rule: MDGD" in text
    assert "mdgd_align: 1.0" in text


# Hooks.


def test_step_hooks_run_once_and_in_order():
    model = network()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Project())
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


@pytest.mark.parametrize("rule", [Project(), StepProject()])
@pytest.mark.parametrize("captured", [False, True])
def test_a_closure_runs_once_with_gradients_enabled(captured, rule):
    outcomes = []
    for as_closure in (False, True):
        model = network()
        optimizer = MDGDOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), rule)
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
    "mdgd": {},
    "project": {"rule": Project(0.5)},
    "step": {"rule": StepProject(0.1)},
    "masked": {"mask": TopK(0.3)},
}


def trained(form, steps=2):
    model = network()
    optimizer = MDGDOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), **form)
    for _ in range(steps):
        step_with_captures(model, optimizer)
    return model, optimizer


def step_with_captures(model, optimizer):
    capture_needed(model, optimizer)
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
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Project())
    capture_both(model, optimizer)
    twin, copied = copy.deepcopy((model, optimizer))
    optimizer.step()
    copied.step()
    assert_same_bits(list(twin.parameters()), list(model.parameters()))

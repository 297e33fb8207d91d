"""Compact MDGD-GM gives the numbers of the dense mode, in a fraction of its memory, and survives checkpoints."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_mdgd import Magnitude, MDGDOptimizer, Random, StepProject, TopK
from torch_mdgd.masks import Mask
from torch_mdgd.rules.base import KINDS

SHAPES = [(30, 20), (7,), (5, 4, 3), (1,)]
BASES: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "adam-foreach-amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
}
FORMS: dict[str, dict[str, Any]] = {
    "published": {"mask": TopK(0.1)},
    "random": {"mask": Random(0.1)},
    "magnitude": {"mask": Magnitude(0.1)},
    "step": {"mask": TopK(0.1), "rule": StepProject(0.1)},
}


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(step: int, kind: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * kind + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def train(optimizer: MDGDOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.set_gradients(**{kind: gradients(step, 1 + KINDS.index(kind)) for kind in optimizer.needs()})
        optimizer.step()
        optimizer.zero_grad()


def changed(before: list[Tensor], after: list[nn.Parameter]) -> int:
    return sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_compact_equals_dense(base: str, form: str) -> None:
    results = []
    for compact in (False, True):
        parameters = make_parameters()
        before = [p.detach().clone() for p in parameters]
        optimizer = MDGDOptimizer(BASES[base](parameters), compact=compact, **FORMS[form])
        train(optimizer, range(6))
        with optimizer.reference():
            assert all(torch.equal(p, x) for p, x in zip(parameters, before, strict=True))
        assert changed(before, parameters) > 0
        results.append(parameters)
    for dense, compact_ in zip(*results, strict=True):
        torch.testing.assert_close(compact_, dense, rtol=1e-5, atol=1e-6)
        assert torch.equal(compact_ == before_of(dense), dense == before_of(dense))


def before_of(parameter: nn.Parameter) -> Tensor:
    return next(x for x in make_parameters() if x.shape == parameter.shape).detach()


@pytest.mark.parametrize("base", ["adamw", "sgd-momentum", "adagrad"])
@pytest.mark.parametrize("form", FORMS)
def test_resume_is_bit_exact(base: str, form: str) -> None:
    steps = range(2, 6)
    parameters = make_parameters()
    optimizer = MDGDOptimizer(BASES[base](parameters), compact=True, **FORMS[form])
    train(optimizer, range(steps.start))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = MDGDOptimizer(BASES[base](resumed), compact=True, **FORMS[form])
    other.load_state_dict(state_dict=torch.load(file, weights_only=True))
    train(optimizer, steps)
    train(other, steps)
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))
    with optimizer.reference(), other.reference():
        assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))


@settings(max_examples=25)
@given(fraction=st.floats(0.01, 1.0), seed=st.integers(0, 1000))
def test_only_the_selected_numbers_move(fraction: float, seed: int) -> None:
    parameters = make_parameters()
    before = [p.detach().clone() for p in parameters]
    base = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    optimizer = MDGDOptimizer(base, mask=Random(fraction, seed), compact=True)
    train(optimizer, range(2))
    n = sum(p.numel() for p in parameters)
    assert changed(before, parameters) == max(1, round(fraction * n))
    assert optimizer.diagnostics["kept_fraction"] == max(1, round(fraction * n)) / n


def live_bytes(optimizer: MDGDOptimizer) -> int:
    """Bytes of everything but parameters that a training run keeps between steps."""
    storage = optimizer._storage
    kept = [x for state in optimizer.base.state.values() for x in state.values() if isinstance(x, Tensor) and x.dim()]
    kept += [*storage.positions, *storage.reference]  # type: ignore[union-attr,misc]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept if x.numel()}.values())


def test_a_tenth_takes_a_fifth_of_dense_adamw() -> None:
    parameters = [nn.Parameter(torch.randn(200, 300)), nn.Parameter(torch.randn(5000))]
    optimizer = MDGDOptimizer(torch.optim.AdamW(parameters), mask=Random(0.1), compact=True)
    kinds = [[torch.randn_like(p) for p in parameters] for _ in range(2)]
    for _ in range(2):
        optimizer.set_gradients(task=kinds[0], visual=kinds[1])
        optimizer.step()
        optimizer.zero_grad()
    dense_adamw = sum(2 * p.numel() * p.element_size() for p in parameters)
    # Two moments, reference and int32 positions of a tenth: 1.6 of 8 bytes a number.
    assert live_bytes(optimizer) <= 0.201 * dense_adamw


def test_an_exception_in_the_wrapped_step_leaves_parameters_and_groups_as_they_were() -> None:
    parameters = make_parameters()
    before = [p.detach().clone() for p in parameters]
    optimizer = MDGDOptimizer(torch.optim.AdamW(parameters), mask=Random(0.1), compact=True)

    def fail(*args: Any) -> None:
        raise OSError("the disk is full")

    handle = optimizer.base.register_step_post_hook(fail)
    optimizer.set_gradients(task=gradients(0, 1), visual=gradients(0, 2))
    with pytest.raises(OSError, match="disk"):
        optimizer.step()
    assert changed(before, parameters) == 0
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in parameters]
    handle.remove()
    optimizer.zero_grad()
    train(optimizer, range(1))
    assert changed(before, parameters) > 0


@pytest.mark.parametrize("make", [lambda p: torch.optim.Muon(p), lambda p: torch.optim.Adafactor(p)])
def test_an_optimizer_that_needs_whole_parameters_is_refused(make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    with pytest.raises(TypeError, match="compact=False, the dense mode"):
        MDGDOptimizer(make([nn.Parameter(torch.randn(4, 4))]), mask=TopK(0.1), compact=True)


def test_compact_needs_a_mask_and_one_that_is_chosen_once() -> None:
    with pytest.raises(ValueError, match=r"compact=True .* pass one, such as mask=TopK"):
        MDGDOptimizer(torch.optim.SGD(make_parameters()), compact=True)
    with pytest.raises(ValueError, match="compact=True keeps one mask: leave out its refresh"):
        MDGDOptimizer(torch.optim.SGD(make_parameters()), mask=TopK(refresh=2), compact=True)


@pytest.mark.parametrize("compact", [False, True])
def test_a_checkpoint_of_the_other_mode_is_refused_and_changes_nothing(compact: bool) -> None:
    def make(mode: bool, mask: Mask) -> MDGDOptimizer:
        return MDGDOptimizer(torch.optim.AdamW(make_parameters()), mask=mask, compact=mode)

    saved, loading = make(compact, Random(0.1)), make(not compact, Random(0.2))
    train(saved, range(1))
    train(loading, range(1))
    before = copy.deepcopy(loading.state_dict())
    with pytest.raises(ValueError, match=f"compact={compact}"):
        loading.load_state_dict(saved.state_dict())
    for key, entry in loading.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before["state"][key][name]))


def test_positions_outside_a_parameter_are_refused() -> None:
    optimizer = MDGDOptimizer(torch.optim.AdamW(make_parameters()), mask=Random(0.1), compact=True)
    train(optimizer, range(1))
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["mdgd_positions"][-1] = 10_000
    with pytest.raises(ValueError, match="parameter 0"):
        optimizer.load_state_dict(state_dict)


def test_deepcopy_of_model_and_optimizer_goes_on_alike() -> None:
    parameters = make_parameters()
    optimizer = MDGDOptimizer(torch.optim.AdamW(parameters), mask=TopK(0.1), compact=True)
    train(optimizer, range(2))
    twins, other = copy.deepcopy((parameters, optimizer))
    train(optimizer, range(2, 4))
    train(other, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))


def test_a_frozen_parameter_may_hold_whole_numbers() -> None:
    # As the weights of a model in 4 bits do.
    frozen = nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)
    p = nn.Parameter(torch.zeros(10))
    optimizer = MDGDOptimizer(torch.optim.AdamW([frozen, p]), mask=Random(0.3), compact=True)
    optimizer.set_gradients(task=[None, torch.ones(10)], visual=[None, None])
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert frozen.tolist() == list(range(8))
    assert int((p != 0).sum()) == 3


@pytest.mark.parametrize("base", ["adamw", "nadam", "sgd-momentum"])
def test_a_parameter_of_no_dimensions_takes_over_what_the_wrapped_optimizer_holds_of_it(base: str) -> None:
    outcomes = []
    for compact in (False, True):
        parameters = [nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3))]
        plain = BASES[base](parameters)
        for p in parameters:
            p.grad = torch.ones_like(p)
        plain.step()
        plain.zero_grad()
        optimizer = MDGDOptimizer(plain, mask=Magnitude(0.5), compact=compact)
        for _ in range(2):
            optimizer.set_gradients(task=[torch.ones(()), torch.ones(3)], visual=[None, None])
            optimizer.step()
            optimizer.zero_grad()
        outcomes.append(parameters)
    for dense, compact_ in zip(*outcomes, strict=True):
        torch.testing.assert_close(compact_, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compact", [False, True])
def test_a_parameter_that_is_trained_only_after_the_mask_was_chosen_stays_outside_it(compact: bool) -> None:
    def make(late: bool) -> tuple[list[nn.Parameter], MDGDOptimizer]:
        parameters = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(6), requires_grad=not late)]
        optimizer = MDGDOptimizer(torch.optim.AdamW(parameters, lr=0.1), mask=Random(0.5), compact=compact)
        parameters[1].requires_grad_(True)
        return parameters, optimizer

    def step(optimizer: MDGDOptimizer) -> None:
        optimizer.set_gradients(task=[torch.ones(4), torch.ones(6)], visual=[None, None])
        optimizer.step()
        optimizer.zero_grad()

    parameters, optimizer = make(late=True)
    for _ in range(2):
        step(optimizer)
    assert [int((p != 1).sum()) for p in parameters] == [2, 0]
    assert optimizer.diagnostics["kept_fraction"] == 0.2
    saved = copy.deepcopy(optimizer.state_dict())
    for late in (False, True):
        resumed, its_optimizer = make(late)
        with torch.no_grad():
            for p, x in zip(resumed, parameters, strict=True):
                p.copy_(x)
        its_optimizer.load_state_dict(saved)
        assert its_optimizer.diagnostics["kept_fraction"] == 0.2
        step(its_optimizer)
        assert [int((p != 1).sum()) for p in resumed] == [2, 0]

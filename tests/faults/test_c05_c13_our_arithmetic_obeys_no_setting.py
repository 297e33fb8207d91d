"""Default dtype and device, autocast, TF32: what the caller sets for the model changes nothing of ours."""

import contextlib
import copy

import pytest
import torch

from tests.faults.registry import (
    DEVICES,
    PAIRS,
    RULES,
    STORAGES,
    WIDTH,
    Branches,
    normal,
    test_every_rule_is_here,
    train,
)
from tests.properties import assert_same_bits
from torch_mdgd import Anchor, MDGDOptimizer
from torch_mdgd.kernels.exact import exact

__all__ = ["test_every_rule_is_here"]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def matmul_precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
        assert torch.get_float32_matmul_precision() == name
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "default dtype float64": lambda device: default_dtype(torch.float64),
    "default dtype bfloat16": lambda device: default_dtype(torch.bfloat16),
    "default device": lambda device: default_device("meta"),
    "device context": lambda device: torch.device("meta"),
    "autocast bfloat16": lambda device: torch.autocast(device, dtype=torch.bfloat16),
    "autocast float16": lambda device: torch.autocast(device, dtype=torch.float16),
    "products in TF32": lambda device: matmul_precision("high"),
    "products in bfloat16": lambda device: matmul_precision("medium"),
    "deterministic": lambda device: deterministic(),
}


def run(setting, device, rule, storage):
    """Parameters after two steps, a checkpoint and two steps more, all of them under a setting."""
    model = Branches(device)
    with setting(device):
        base = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
        optimizer = MDGDOptimizer(base, RULES[rule](model), **STORAGES[storage])
        train(model, optimizer, range(2))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, range(2, 4))
        assert all(torch.isfinite(torch.tensor(x, device="cpu")) for x in optimizer.diagnostics.values())
    return [p.detach() for p in model.parameters()]


@pytest.fixture(scope="module")
def plain():
    """What comes out without any setting."""
    found = {}

    def of(device, rule, storage):
        key = device, rule, storage
        if key not in found:
            found[key] = run(lambda device: contextlib.nullcontext(), *key)
        return found[key]

    return of


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("rule", "storage"), PAIRS)
def test_a_run_is_the_same_under_a_setting(plain, rule, storage, setting, device):
    # The same operations on one machine.
    assert_same_bits(run(SETTINGS[setting], device, rule, storage), plain(device, rule, storage))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rank", [None, 2])
def test_the_loss_of_an_anchor_is_the_same_under_a_setting(setting, rank):
    def outcome(setting):
        model = Branches()
        with setting("cpu"):
            anchor = Anchor(model, 0.3, rank=rank, tokens="image", relative=False, text_module=model).hold()
            images = torch.ones(2, 4, dtype=torch.bool, device="cpu")
            anchor.calibrate([{"x": normal((2, 4, WIDTH), 1)}], lambda batch: images)
            with torch.no_grad():
                for i, p in enumerate(model.parameters()):
                    p.add_(normal(p.shape, 10 + i))
            loss = anchor.loss()
        # A backward pass is the caller's, and torch says to run it outside of autocast.
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    assert_same_bits(outcome(SETTINGS[setting]), outcome(lambda device: contextlib.nullcontext()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["highest", "high", "medium"])
def test_what_the_caller_has_set_is_there_again(device, name):
    with matmul_precision(name):
        products = torch.backends.mkldnn.matmul if device == "cpu" else torch.backends.cuda.matmul
        before = products.fp32_precision
        with exact([torch.device(device)]):
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == before

"""accelerate: prepare, accumulation, clipping, checkpoints, bf16 and a gradient scaler."""

import copy

import pytest
import torch
from accelerate import Accelerator

from tests import accelerate_state
from tests.passes import trainable, wrap
from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD, Anchor, MDGDOptimizer, TopK, VisualTap, mdgd_backward
from torch_mdgd.backward import find_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Anchor holds linear layers")


@pytest.fixture(autouse=True)
def fresh_state():
    with accelerate_state.fresh():
        yield


def anchored(model):
    """Calibrated with batches of its own, and v at each second step."""
    batches = [{name: x for name, x in llava_batch(20).items() if name != "labels"}]
    return Anchor(model, 0.5, rank=4, rule=MDGD(0.5, regularize=0, every=2)).calibrate(batches)


SETTINGS = {
    "published": {},
    "refreshed": {"mask": TopK(0.2, refresh=2)},
    "compact": {"mask": TopK(0.2), "compact": True},
    "anchor and lazy": {"rule": anchored},
}


def make(accelerator, settings, scheduled=True, factor=1.0):
    model = llava(dropout=0.2).train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    optimizer = wrap(torch.optim.AdamW(trainable(model), lr=0.02), model, **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) if scheduled else None
    return accelerator.prepare(model, optimizer, *([scheduler] if scheduled else []))


def run(accelerator, model, optimizer, scheduler, seeds):
    for seed in seeds:
        with accelerator.accumulate(model):
            torch.manual_seed(seed)
            mdgd_backward(
                model, optimizer, llava_batch(seed), weight=0.5, combine=accelerator.sync_gradients,
                scaler=accelerator.scaler,
            )  # fmt: skip
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_prepared_loop_is_the_loop_without_accelerate_bit_for_bit(name, precision):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model, optimizer, scheduler = make(accelerator, SETTINGS[name])
    run(accelerator, model, optimizer, scheduler, range(6))

    plain = llava(dropout=0.2).train()
    inner = wrap(torch.optim.AdamW(trainable(plain), lr=0.02), plain, **SETTINGS[name])
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1 / (1 + step))
    for seed in range(6):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            mdgd_backward(plain, inner, llava_batch(seed), weight=0.5, combine=seed % 2 == 1)
        if seed % 2:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            inner.step()
            schedule.step()
            inner.zero_grad()
    assert_same_bits(weights(model), weights(plain))
    assert find_optimizer(optimizer).diagnostics == inner.diagnostics


def with_precision(precision):
    """The scaler is that of float16, which accelerate has for accelerators alone; it grows after each third step."""
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16" if precision == "bf16" else "no"
    )
    if precision == "scaler":
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return accelerator


@pytest.mark.parametrize("precision", ["no", "bf16", "scaler"])
@pytest.mark.parametrize("name", SETTINGS)
def test_save_state_and_load_state(name, precision, tmp_path):
    accelerator = with_precision(precision)
    parts = make(accelerator, SETTINGS[name])
    run(accelerator, *parts, range(4))
    accelerator.save_state(str(tmp_path))
    run(accelerator, *parts, range(4, 10))
    wanted = weights(parts[0])
    assert precision != "scaler" or accelerator.scaler.get_scale() == 2.0**11

    accelerate_state.reset()
    accelerator = with_precision(precision)
    # Neither weights nor reference may be those of the beginning.
    parts = make(accelerator, SETTINGS[name], factor=1.5)
    accelerator.load_state(str(tmp_path))
    run(accelerator, *parts, range(4, 10))
    assert_same_bits(weights(parts[0]), wanted)


class Overflowing(VisualTap):
    """Makes the gradient of one loss infinite in one of the passes that have a graph."""

    def __init__(self, tap, kind):
        self.tap, self.mask, self.text_module = tap, tap.mask, tap.text_module
        self.name, self.at = kind.removeprefix("reference_"), 0 if kind.startswith("reference") else 1
        self.calls = 0

    def __call__(self, model, batch):
        output, z = self.tap(model, batch)
        if z.requires_grad:
            if self.calls == self.at:
                (z if self.name == "visual" else output.loss).register_hook(lambda grad: grad * float("inf"))
            self.calls += 1
        return output, z

    def features(self, model, batch, **options):
        return self.tap.features(model, batch, **options)


@pytest.mark.parametrize("settings", [{}, {"mask": TopK(0.2)}], ids=["published", "mask chosen"])
@pytest.mark.parametrize("kind", ["task", "visual", "reference_task", "reference_visual"])
def test_an_overflow_in_any_gradient_skips_the_step_and_loses_nothing(kind, settings):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, optimizer = make(accelerator, settings, scheduled=False)
    twin_model = copy.deepcopy(model)
    twin = MDGDOptimizer(torch.optim.AdamW(trainable(twin_model), lr=0.02), **settings)
    assert optimizer.scaler is accelerator.scaler
    # Beside the first step, where visual gradients are zero, one when they are not.
    with torch.no_grad():
        for p, q in zip(find_optimizer(optimizer).parameters, twin.parameters, strict=True):
            p.add_(0.01)
            q.copy_(p)
    before = weights(model)
    tap = Overflowing(VisualTap.for_model(model), kind)
    torch.manual_seed(0)
    mdgd_backward(model, optimizer, llava_batch(0), tap=tap, scaler=accelerator.scaler)
    optimizer.step()
    optimizer.zero_grad()
    assert tap.calls == 2
    assert optimizer.step_was_skipped
    assert accelerator.scaler.get_scale() == 2.0**9
    assert_same_bits(weights(model), before)
    assert not optimizer.state
    assert "kept_fraction" not in find_optimizer(optimizer).diagnostics

    torch.manual_seed(1)
    mdgd_backward(model, optimizer, llava_batch(1), scaler=accelerator.scaler)
    accelerator.scaler.unscale_(find_optimizer(optimizer))
    torch.manual_seed(1)
    mdgd_backward(twin_model, twin, llava_batch(1))
    assert_same_bits([p.grad for p in find_optimizer(optimizer).parameters], [p.grad for p in twin.parameters])
    optimizer.step()
    twin.step()
    assert not optimizer.step_was_skipped
    assert_same_bits(weights(model), weights(twin_model))


def test_what_is_no_mdgd_optimizer_is_refused():
    accelerator = Accelerator(cpu=True)
    model = llava()
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="optimizer must be an MDGDOptimizer, got SGD"):
        mdgd_backward(model, optimizer, llava_batch())

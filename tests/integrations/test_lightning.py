"""Lightning: manual and automatic optimization, accumulation, clipping, schedulers, a gradient scaler, resume."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from tests.passes import trainable, wrap
from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD, Anchor, StepProject, TopK, VisualTap, mdgd_backward, visual_alignment_loss
from torch_mdgd.backward import find_optimizer
from torch_mdgd.integrations.lightning import MDGDModuleMixin
from torch_mdgd.rules.base import KINDS


def anchored(model):
    """Calibrated with batches of its own, and v at each second step."""
    batches = [{name: x for name, x in llava_batch(20).items() if name != "labels"}]
    return Anchor(model, 0.5, rank=4, rule=MDGD(0.5, regularize=0, every=2)).calibrate(batches)


pytestmark = pytest.mark.filterwarnings("ignore:Anchor holds linear layers")
# Steps over five batches: with two micro-batches a step the last has one.
BATCHES = [llava_batch(seed) for seed in range(5)]
SETTINGS = {
    "published": {},
    "compact": {"mask": TopK(0.2), "compact": True},
    "step": {"rule": StepProject(restore=0.1)},
    "anchor and lazy": {"rule": anchored},
}


def make_optimizer(model, settings):
    """With None the plain optimizer."""
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    optimizer = optimizer if settings is None else wrap(optimizer, model, **settings)
    return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def reseed(batch):
    """Dropout must not depend on where a run began."""
    torch.manual_seed(int(batch["input_ids"].sum()))


class Module(MDGDModuleMixin, LightningModule):
    """Automatic optimization."""

    def __init__(self, settings):
        super().__init__()
        self.model, self.settings, self.calls, self.norms = llava(dropout=0.2).train(), settings, 0, []

    def configure_optimizers(self):
        optimizer, scheduler = make_optimizer(self.model, self.settings)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def training_step(self, batch, batch_idx):
        reseed(batch)
        self.calls += 1
        return self.mdgd_backward(self.model, batch)

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(norm(optimizer))


class Plain(Module):
    """Automatic optimization that captures nothing."""

    def training_step(self, batch, batch_idx):
        reseed(batch)
        self.calls += 1
        return self.model(**batch).loss


class Manual(Module):
    """Manual optimization, with what ``self.optimizers()`` returns."""

    backward_pass = staticmethod(mdgd_backward)

    def __init__(self, settings):
        super().__init__(settings)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        reseed(batch)
        self.backward_pass(self.model, optimizer, batch)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()


def captures(model, optimizer, batch):
    """The hook API: the four gradients of one step."""
    tap = VisualTap.for_model(model)
    with torch.no_grad():
        z = tap(model, batch)[1]
    with optimizer.reference():
        output, z_reference = tap(model, batch)
        with optimizer.capture("visual"):
            visual_alignment_loss(z_reference, z).backward(retain_graph=True)
        with optimizer.capture("task"):
            output.loss.backward()
    output, z = tap(model, batch)
    with optimizer.capture("visual"):
        visual_alignment_loss(z, z_reference.detach()).backward(retain_graph=True)
    with optimizer.capture("task"):
        output.loss.backward()
    optimizer.combine()


class Hooks(Manual):
    """Manual optimization with the hook API on what ``self.optimizers()`` returns."""

    backward_pass = staticmethod(captures)


class StandIn(Manual):
    """Lightning's stand-in is told of the reference, and of gradients that hold no mask."""

    def training_step(self, batch, batch_idx):
        optimizer, self.own = self.optimizers(), self.trainer.optimizers[0]
        self.found = find_optimizer(optimizer)
        with optimizer.reference(), self.own.capture("task"):
            self.model(**batch).loss.backward()
        self.captured = list(optimizer.captured)
        optimizer.discard()
        nan = [torch.full_like(p, torch.nan) for p in optimizer.parameters]
        optimizer.set_gradients(**dict.fromkeys(KINDS, nan))
        optimizer.combine()
        optimizer.step()


def norm(optimizer):
    return torch.nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]])


def fit(module, folder, epochs=1, resume=None, batches=BATCHES, **options):
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    # Of True Lightning makes torch.load(..., weights_only=True).
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resume, weights_only=True)
    return trainer


def by_hand(settings, backward=mdgd_backward, micro_batches=1, clip=None, dtype=None, scaler=None):
    """The same loop without Lightning: model, optimizer, and the norm of each step's gradient before clipping."""
    model, norms = llava(dropout=0.2).train(), []
    optimizer, scheduler = make_optimizer(model, settings)
    options = {} if backward is captures else {"weight": 1 / micro_batches, "scaler": scaler}
    for i, batch in enumerate(BATCHES, 1):
        last = i % micro_batches == 0 or i == len(BATCHES)
        if micro_batches > 1:
            options["combine"] = last
        reseed(batch)
        if settings is None:
            model(**batch).loss.backward()
        else:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
                backward(model, optimizer, batch, **options)
        if not last:
            continue
        if scaler:
            scaler.unscale_(optimizer)
        norms.append(norm(optimizer))
        if clip:
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer, norms


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


# What a rule makes of a step, with mdgd_backward; the hook API leaves that to whoever calls it.
@pytest.mark.parametrize(
    ("name", "kind"),
    [("published", Manual), ("step", Manual), ("anchor and lazy", Manual), ("published", Hooks), ("compact", Hooks)],
)
def test_manual_optimization_is_the_loop_by_hand(kind, name, tmp_path):
    module = Manual(SETTINGS[name]) if kind is Manual else Hooks(SETTINGS[name])
    trainer = fit(module, tmp_path)
    model, optimizer, _ = by_hand(SETTINGS[name], kind.backward_pass, clip=0.5)
    assert trainer.global_step == len(BATCHES)
    assert_same_bits(weights(module.model), weights(model))
    assert trainer.optimizers[0].diagnostics == optimizer.diagnostics


@pytest.mark.parametrize("settings", [None, {}], ids=["plain", "wrapped"])
def test_with_nothing_captured_automatic_optimization_is_the_plain_optimizer(settings, tmp_path):
    module = Plain(settings)
    fit(module, tmp_path)
    assert module.calls == len(BATCHES)
    assert_same_bits(weights(module.model), weights(by_hand(None)[0]))


@pytest.mark.parametrize(("name", "micro_batches"), [("published", 1), *((name, 2) for name in SETTINGS)])
def test_automatic_optimization_is_the_loop_by_hand(name, micro_batches, tmp_path):
    module = Module(SETTINGS[name])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = fit(module, tmp_path, accumulate_grad_batches=micro_batches, gradient_clip_val=0.1)
    model, optimizer, norms = by_hand(SETTINGS[name], micro_batches=micro_batches, clip=0.1)
    assert module.calls == len(BATCHES)
    assert not [w for w in seen if "scheduler" in str(w.message)]
    # What is clipped is d, and it is long enough to be.
    assert module.norms == norms
    assert min(norms) > 0.1
    assert_same_bits(weights(module.model), weights(model))
    assert trainer.optimizers[0].diagnostics == optimizer.diagnostics


def test_a_gradient_scaler(tmp_path):
    module = Module({})
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    fit(module, tmp_path, plugins=plugin, gradient_clip_val=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, _, norms = by_hand({}, clip=0.1, dtype=torch.float16, scaler=scaler)
    assert plugin.scaler.get_scale() == scaler.get_scale()
    assert module.norms == norms
    assert_same_bits(weights(module.model), weights(model))


# The kinds of optimization load alike; what else there is to load is in test_lightning_resume.py.
@pytest.mark.parametrize(
    ("name", "kind"), [("published", Module), ("anchor and lazy", Module), ("step", Manual), ("compact", Manual)]
)
def test_resumed_is_uninterrupted_bit_for_bit(name, kind, tmp_path):
    whole = kind(SETTINGS[name])
    fit(whole, tmp_path, epochs=2)

    fit(kind(SETTINGS[name]), tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    resumed = kind(SETTINGS[name])
    with torch.no_grad():
        for p in resumed.parameters():
            p.mul_(1.5)
    fit(resumed, tmp_path, epochs=2, resume=tmp_path / "half.ckpt")
    assert resumed.calls == (whole.calls - len(BATCHES) if kind is Module else 0)
    assert_same_bits(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize(
    ("options", "wanted"), [({}, []), ({"separate": True}, range(5)), ({"diagnose_every": 2}, [0, 2, 4])]
)
def test_options_reach_mdgd_backward(options, wanted, tmp_path):
    """One backward pass a step, and a second one where g and v are taken apart."""
    counted = []

    class Asking(Module):
        def training_step(self, batch, batch_idx):
            return self.mdgd_backward(self.model, batch, **options)

    module = Asking({"rule": MDGD(0.5, regularize=0)})
    norm = module.model.model.language_model.norm
    norm.register_full_backward_hook(lambda *_: counted.append(module.trainer.global_step))
    fit(module, tmp_path)
    assert counted == sorted([*range(5), *wanted])


def test_the_optimizer_knows_what_its_stand_in_was_told(tmp_path):
    module = StandIn({"mask": TopK(0.2)})
    with pytest.raises(RuntimeError, match="a gradient holds NaN or Inf"):
        fit(module, tmp_path)
    assert module.found is module.own
    assert module.captured == ["reference_task"]


def test_an_optimizer_that_is_not_wrapped_is_refused(tmp_path):
    with pytest.raises(TypeError, match="optimizer must be an MDGDOptimizer, got AdamW"):
        fit(Module(None), tmp_path)


def test_the_mixin_behind_the_module_is_refused():
    with pytest.raises(TypeError, match="class Wrong: put MDGDModuleMixin before LightningModule"):
        type("Wrong", (LightningModule, MDGDModuleMixin), {})


def test_several_processes_whose_gradients_nobody_averages_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"strategy='ddp' or ModelParallelStrategy, not with SingleDevice"):
        fit(Module({}), tmp_path)

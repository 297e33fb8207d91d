"""The doors of frameworks that CI does not install: stand-ins with their documented signatures around a real Trainer.

``test_real_frameworks.py`` runs the frameworks themselves, where they are installed.
"""

import importlib
import sys
from collections import defaultdict
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from tests.integrations.test_transformers import arguments, dataset, train, weights
from tests.passes import trainable
from tests.properties import assert_same_bits
from tests.tiny_models import llava
from torch_mdgd import MDGD, Random
from torch_mdgd.backward import find_optimizer
from torch_mdgd.integrations.transformers import MDGDTrainer, MDGDTrainerMixin, adopt

RULE = "MDGD(0.5, regularize=0)"
SETTINGS = {"rule": RULE, "mask": "Random(0.5)"}


@pytest.fixture
def installed(monkeypatch):
    """Lets modules of these names be imported, and the integration anew."""

    def install(integration, **modules):
        for path, names in modules.items():
            module = ModuleType(path.replace("__", "."))
            vars(module).update(names)
            for i in range(1, path.count("__") + 1):
                parent = ".".join(path.split("__")[:i])
                monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
            monkeypatch.setitem(sys.modules, module.__name__, module)
            parent, _, child = module.__name__.rpartition(".")
            if parent:
                monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
        name = f"torch_mdgd.integrations.{integration}"
        found = importlib.import_module(name)
        del sys.modules[name]
        return found

    return install


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    return train(MDGDTrainer, tmp_path_factory.mktemp("wanted"), settings=SETTINGS)


def test_text_is_the_rule_and_the_mask(wanted, tmp_path):
    spoken = train(MDGDTrainer, tmp_path, settings={"rule": MDGD(0.5, regularize=0), "mask": Random(0.5)})
    assert_same_bits(weights(spoken), weights(wanted))


def test_text_that_is_no_rule_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="'mdgd' is not a rule"):
        train(MDGDTrainer, tmp_path, settings={"rule": "mdgd"})


def made(kind, folder, settings=None, **options):
    model = llava(dropout=0.2)
    trainable(model)
    return kind(model=model, args=arguments(folder, **(settings or {})), train_dataset=dataset(), **options)


def test_a_trainer_that_is_adopted_is_one_with_the_mixin(wanted, tmp_path):
    trainer = made(Trainer, tmp_path)
    adopt(trainer, **SETTINGS)
    assert isinstance(trainer, MDGDTrainerMixin)
    assert type(trainer).__name__ == "MDGDTrainer"
    trainer.train()
    assert_same_bits(weights(trainer), weights(wanted))
    assert [x.get("visual_loss") for x in trainer.state.log_history] == [
        x.get("visual_loss") for x in wanted.state.log_history
    ]
    with pytest.raises(TypeError, match="has the mixin already"):
        adopt(trainer)


def test_what_the_passes_cannot_hold_is_refused_when_a_trainer_is_adopted(tmp_path):
    trainer = made(Trainer, tmp_path)
    trainer.args.optim = "lomo"
    with pytest.raises(ValueError, match="LOMO"):
        adopt(trainer)
    # It is what it was.
    assert type(trainer) is Trainer


class OptimizerCallback:
    """ms-swift's: swift/optimizers/base.py."""

    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer

    def create_optimizer(self, model=None):
        kwargs = {} if model is None else {"model": model}
        return Trainer.create_optimizer(self.trainer, **kwargs)


class SwiftCallback(TrainerCallback):
    """ms-swift's: swift/callbacks/base.py."""

    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer


class CustomCrossEntropyLoss:
    """ms-swift's: swift/loss/base.py and causal_lm.py."""

    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer

    def __call__(self, outputs, labels, *, num_items_in_batch=None, loss_scale=None, **kwargs):
        logits, labels = outputs.logits.float().flatten(0, 1), labels.roll(-1, dims=-1).flatten()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


class Metric:
    """ms-swift's mean since the last log, of the last value: swift/metrics/utils.py."""

    def update(self, value):
        self.value = float(value)


class SwiftTrainer(Trainer):
    """As far as it goes for optimizers, losses and callbacks: swift/trainers/mixin.py."""

    optimizers_map: ClassVar[dict] = {}
    callbacks_map: ClassVar[dict] = {}
    loss_map: ClassVar[dict] = {}

    def __init__(self, *, args, optimizer="default", loss_type=None, **kwargs):
        args.callbacks, args.resume_only_model = getattr(args, "callbacks", []), False
        self.custom_metrics = {"train": defaultdict(Metric)}
        self.optimizer_callback = self.optimizers_map[optimizer](args, self)
        if loss_type is not None:
            kwargs["compute_loss_func"] = self.loss_map[loss_type](args, self)
        callbacks = [self.callbacks_map[name](args, self) for name in args.callbacks]
        super().__init__(args=args, callbacks=callbacks, **kwargs)

    def log(self, logs, *args):
        found = {name: metric.value for name, metric in self.custom_metrics["train"].items()}
        super().log({**logs, **found}, *args)

    def create_optimizer(self, model=None):
        self._optimizer_ori = self.optimizer = self.optimizer_callback.create_optimizer(model=model)
        self.optimizer.param_groups = [pg for pg in self.optimizer.param_groups if len(pg["params"]) > 0]
        return self.optimizer


def swift(installed, monkeypatch):
    monkeypatch.setattr(SwiftTrainer, "optimizers_map", {"default": OptimizerCallback})
    for name in ("callbacks_map", "loss_map"):
        monkeypatch.setattr(SwiftTrainer, name, {})
    return installed(
        "swift",
        swift__loss={"loss_map": SwiftTrainer.loss_map},
        swift__loss__causal_lm={"CustomCrossEntropyLoss": CustomCrossEntropyLoss},
        swift__optimizers={"OptimizerCallback": OptimizerCallback, "optimizers_map": SwiftTrainer.optimizers_map},
        swift__callbacks={"TrainerCallback": SwiftCallback, "callbacks_map": SwiftTrainer.callbacks_map},
    )


def test_ms_swift(installed, monkeypatch, wanted, tmp_path):
    swift(installed, monkeypatch).register(**SETTINGS)
    trainer = made(SwiftTrainer, tmp_path, optimizer="mdgd")
    trainer.train()
    assert_same_bits(weights(trainer), weights(wanted))
    # ms-swift's schedule is on the plain optimizer, which the other wraps.
    assert find_optimizer(trainer.optimizer).base is trainer._optimizer_ori
    assert trainer.args.callbacks == ["mdgd"]


def test_ms_swift_checkpoints_without_reentrance(installed, monkeypatch, tmp_path):
    swift(installed, monkeypatch).register("other", rule=RULE)
    model = llava()
    trainable(model)
    args = arguments(tmp_path)
    args.gradient_checkpointing, args.gradient_checkpointing_kwargs = True, None
    SwiftTrainer(model=model, args=args, train_dataset=dataset(), optimizer="other")
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_ms_swift_by_its_loss(installed, monkeypatch, tmp_path):
    door = swift(installed, monkeypatch)
    door.register_loss(align=0.5, alignment="mse")
    # Not Adam, which enlarges rounding where a gradient is small.
    settings = {"gradient_accumulation_steps": 2, "optim": "sgd"}
    wanted = train(MDGDTrainer, tmp_path / "wanted", settings={"rule": RULE, "alignment": "mse"}, **settings)
    trainer = made(SwiftTrainer, tmp_path, settings, loss_type="mdgd")
    trainer.train()
    for x, y in zip(weights(trainer), weights(wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    seen, same = ([e["visual_loss"] for e in x.state.log_history[:-1]] for x in (trainer, wanted))
    assert seen == pytest.approx(same, rel=1e-4)
    assert seen[0] == 0 < seen[-1]

    door.register("optimizer", rule=RULE)
    trainer = made(SwiftTrainer, tmp_path, loss_type="mdgd", optimizer="optimizer")
    with pytest.raises(ValueError, match="counts αv twice"):
        trainer.train()


def test_ms_swifts_loss_refuses_a_reference_that_it_cannot_have(installed, monkeypatch, tmp_path):
    swift(installed, monkeypatch).register_loss()
    adapted = get_peft_model(llava(), LoraConfig(target_modules=["q_proj"]))
    args = arguments(tmp_path)
    args.resume_from_checkpoint = str(tmp_path)
    with pytest.raises(ValueError, match="resume_from_checkpoint"):
        SwiftTrainer(model=adapted, args=args, train_dataset=dataset(), loss_type="mdgd")

    class Divided(SwiftTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    with pytest.raises(ValueError, match="with DeepSpeed or FSDP"):
        made(Divided, tmp_path, loss_type="mdgd")


class CustomSeq2SeqTrainer(Trainer):
    """LLaMA-Factory's: llamafactory/train/sft/trainer.py."""

    def __init__(self, finetuning_args, processor, **kwargs):
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(**kwargs)
        self.finetuning_args = finetuning_args


def test_llama_factory(installed, wanted, tmp_path):
    seen = {}
    workflow = ModuleType("workflow")
    workflow.CustomSeq2SeqTrainer = CustomSeq2SeqTrainer

    def run_exp(args=None, callbacks=None):
        seen.update(args=args)
        model = llava(dropout=0.2)
        trainable(model)
        seen["trainer"] = workflow.CustomSeq2SeqTrainer(
            model=model, args=arguments(tmp_path), finetuning_args=None, processor=None, tokenizer=None,
            train_dataset=dataset(),
        )  # fmt: skip
        seen["trainer"].train()

    door = installed(
        "llamafactory",
        llamafactory__hparams={"read_args": None},
        llamafactory__train__sft={"workflow": workflow},
        llamafactory__train__sft__trainer={"CustomSeq2SeqTrainer": CustomSeq2SeqTrainer},
        llamafactory__train__tuner={"run_exp": run_exp},
    )
    door.train({"stage": "sft", "mdgd_rule": RULE, "mdgd_mask": "Random(0.5)", "template": "qwen2_vl"})
    assert seen["args"] == {"stage": "sft", "template": "qwen2_vl", "use_reentrant_gc": False}
    assert_same_bits(weights(seen["trainer"]), weights(wanted))
    assert workflow.CustomSeq2SeqTrainer is CustomSeq2SeqTrainer
    door.run_exp = lambda args: seen.update(options=workflow.CustomSeq2SeqTrainer.keywords)
    door.train({"stage": "sft", "mdgd_rule": None, "mdgd_mask": None})
    assert seen["options"] == {"rule": "MDGD(3.0, regularize=0)", "mask": None}
    for settings, message in (
        ({"stage": "dpo"}, "not with stage: dpo"),
        ({"stage": "sft", "use_reentrant_gc": True}, "use_reentrant_gc"),
    ):
        with pytest.raises(ValueError, match=message):
            door.train(settings)


class Settings(dict):
    """Axolotl's DictDefault."""

    __getattr__ = dict.get


def axolotl(installed):
    return installed("axolotl", axolotl__integrations__base={"BasePlugin": type("BasePlugin", (), {})})


def test_axolotl(installed, wanted, tmp_path):
    pytest.importorskip("pydantic")
    door = axolotl(installed)
    plugin = door.MDGDPlugin()
    assert plugin.get_input_args() == "torch_mdgd.integrations.axolotl.MDGDArgs"
    given = {"mdgd_rule": RULE, "mdgd_mask": "Random(0.5)"}
    cfg = Settings(**given, gradient_checkpointing=True)
    plugin.register(cfg)
    assert cfg.gradient_checkpointing_kwargs == {"use_reentrant": False}
    trainer = made(Trainer, tmp_path)
    plugin.post_trainer_create(Settings(door.MDGDArgs(**given).model_dump()), trainer)
    trainer.train()
    assert_same_bits(weights(trainer), weights(wanted))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mdgd_rule": "mdgd"}, "is not a rule"),
        ({"mdgd_mask": "0.1"}, "is not a mask"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
    ],
)
def test_axolotl_refuses_before_a_model_is_loaded(installed, settings, message):
    pytest.importorskip("pydantic")
    with pytest.raises(ValueError, match=message):
        axolotl(installed).MDGDPlugin().register(Settings(settings))


class UnslothTrainer(Trainer):
    """Unsloth's: unsloth/trainer.py."""

    def create_optimizer(self, model=None):
        return super().create_optimizer(model)


def test_unsloth(installed, wanted, tmp_path):
    door = installed("unsloth", unsloth={"UnslothTrainer": UnslothTrainer})
    trainer = made(door.MDGDUnslothTrainer, tmp_path, **SETTINGS)
    trainer.train()
    assert_same_bits(weights(trainer), weights(wanted))

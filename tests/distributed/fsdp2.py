"""FSDP2 through accelerate and the Trainer, in every process of a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from transformers import TrainingArguments

from tests import accelerate_state
from tests.distributed import integrations, setups
from tests.passes import wrap
from tests.tiny_models import llava
from torch_mdgd import MDGD, Anchor, TopK, mdgd_backward
from torch_mdgd.backward import find_optimizer
from torch_mdgd.integrations.transformers import MDGDTrainer

SETTINGS: dict[str, dict[str, Any]] = {
    "published": {},
    "masked": {"mask": TopK(0.2)},
    "anchor": {"rule": lambda model: Anchor(model, 0.05, rank=None, warmup=2, rule=MDGD(0.5, regularize=0))},
}
STEPS, MICRO_BATCHES, CLIP = 3, 2, 0.05
LAYER = "LlamaDecoderLayer"


def network() -> nn.Module:
    model = llava().double()
    model.model.vision_tower.requires_grad_(False)
    return model


def rows() -> list[dict[str, torch.Tensor]]:
    """All with pictures, as sharded modules need."""
    found = [row for row in integrations.rows() if "pixel_values" in row]
    return [*found, *found]


def trainer(
    world: int,
    folder: Path,
    settings: str,
    resume: str | None = None,
    kind: str = "FULL_STATE_DICT",
    diagnose_every: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    with accelerate_state.accelerators() if world > 1 else accelerate_state.fresh():
        model = network()
        if resume is not None:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)
        arguments = {
            "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4 // world,
            "gradient_accumulation_steps": MICRO_BATCHES, "max_grad_norm": CLIP, "use_cpu": world == 1,
            "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 3,
            "optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential",
        }  # fmt: skip
        if world > 1:
            wrapping = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": [LAYER]}
            arguments |= {"fsdp": True, "fsdp_config": {"version": 2, **wrapping, "state_dict_type": kind}}
        found = MDGDTrainer(
            model=model, args=TrainingArguments(**{**arguments, **more}), train_dataset=rows(),
            data_collator=integrations.collate, **SETTINGS[settings], alignment="mse", effective_rank_steps=1,
            diagnose_every=diagnose_every,
        )  # fmt: skip
        found.train(resume_from_checkpoint=resume)
        kept = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
        logs = [{k: v for k, v in entry.items() if k not in kept} for entry in found.state.log_history]
        weights = [setups.whole(p) for p in found.model.parameters() if p.requires_grad]
        return {"weights": weights, "diagnostics": find_optimizer(found.optimizer).diagnostics, "logs": logs}


def resumed_trainer(folder: Path, settings: str, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "diagnose_every": 1, "kind": kind}
    whole = trainer(2, folder, settings, **more)
    return whole, trainer(2, folder, settings, **more, resume=str(folder / "checkpoint-2"))


def accelerated(rank: int, world: int, settings: str) -> dict[str, Any]:
    with accelerate_state.accelerators() if world > 1 else accelerate_state.fresh():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[LAYER]
        )
        sharding = {"fsdp_plugin": plugin} if world > 1 else {"cpu": True}
        accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES, **sharding)
        net = network()
        optimizer = wrap(integrations.sgd(net), net, **SETTINGS[settings])
        model, optimizer = accelerator.prepare(net, optimizer)
        for step in range(STEPS * MICRO_BATCHES):
            with accelerator.accumulate(model):
                mdgd_backward(
                    model, optimizer, setups.llava_part(step, rank, world, (True,) * 4), weight=1 / MICRO_BATCHES,
                    alignment="mse", combine=accelerator.sync_gradients,
                )  # fmt: skip
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        weights = [setups.whole(p) for p in model.parameters() if p.requires_grad]
        return {"weights": weights, "diagnostics": find_optimizer(optimizer).diagnostics}


def run(case: Callable[..., None], folder: Path, rank: int) -> None:
    for settings in SETTINGS:
        case(f"fsdp2 trainer, {settings}", trainer, 2, folder / "fsdp2", settings)
    case("fsdp2 accelerate", accelerated, rank, 2, "masked")
    for settings, kind in (("masked", "FULL_STATE_DICT"), ("anchor", "SHARDED_STATE_DICT")):
        case(f"fsdp2 resumed, {settings}", resumed_trainer, folder / f"fsdp2 {settings}", settings, kind)

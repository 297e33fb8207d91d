"""FSDP2 through accelerate, the Trainer and Lightning, in every process of a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader
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
# Of those that are resumed.
LONGER: dict[str, Any] = {"max_steps": 4, "diagnose_every": 1}
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


def resumed_trainer(folder: Path, settings: str) -> list[dict[str, Any]]:
    """Uninterrupted, and gone on with after two steps; whole tensors of the first process, or shards, are saved."""
    kind = "SHARDED_STATE_DICT" if settings == "anchor" else "FULL_STATE_DICT"
    more = {**LONGER, "save_strategy": "steps", "save_steps": 2, "kind": kind}
    return [trainer(2, folder, settings, resume, **more) for resume in (None, str(folder / "checkpoint-2"))]


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


class Sharded(integrations.Automatic):
    """Automatic optimization of a model that Lightning's hook shards."""

    shards = True

    def configure_model(self) -> None:
        if self.trainer.world_size > 1 and self.shards and not isinstance(self.model, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for module in (*self.model.model.language_model.layers, self.model.model.multi_modal_projector):
                fully_shard(module, mesh=mesh)
            fully_shard(self.model, mesh=mesh)


class Whole(Sharded):
    """With the strategy, and not sharded."""

    shards = False


def lightning(
    rank: int,
    world: int,
    folder: Path,
    settings: str,
    epochs: int = 1,
    resume: Path | None = None,
    kind: type[Sharded] = Sharded,
    sizes: tuple[int, int] = (2, 1),
) -> dict[str, Any]:
    """Two steps an epoch; after one epoch it is saved to the folder, as shards."""
    module = kind(settings)
    if resume is not None:
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.5)
    found = LightningTrainer(
        accelerator="cpu", devices=world, strategy=ModelParallelStrategy(*sizes) if world > 1 else "auto",
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=False,
        accumulate_grad_batches=MICRO_BATCHES, gradient_clip_val=CLIP,
    )  # fmt: skip
    batches = [setups.llava_part(step, rank, world, (True,) * 4) for step in range(2 * MICRO_BATCHES)]
    found.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resume, weights_only=True)
    if world > 1 and epochs == 1:
        found.save_checkpoint(folder / "1.ckpt")
    weights = [setups.whole(p) for p in module.model.parameters() if p.requires_grad]
    return {"weights": weights, "diagnostics": find_optimizer(found.optimizers[0]).diagnostics}


def resumed_lightning(rank: int, folder: Path, settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = lightning(rank, 2, folder, settings, epochs=2)
    lightning(rank, 2, folder, settings)
    return whole, lightning(rank, 2, folder, settings, epochs=2, resume=folder / "1.ckpt")


def run(case: Callable[..., None], folder: Path, rank: int) -> None:
    case("fsdp2 lightning", resumed_lightning, rank, folder / "fsdp2 lightning", "published")
    for name, kind, sizes in (("tensor parallel", Sharded, (1, 2)), ("not sharded", Whole, (2, 1))):
        case(f"lightning, {name}", setups.error, lightning, rank, 2, folder, "published", kind=kind, sizes=sizes)
    case("fsdp2 trainer", trainer, 2, folder / "fsdp2", "published")
    case("fsdp2 accelerate", accelerated, rank, 2, "masked")
    for settings in ("masked", "anchor"):
        case(f"fsdp2 resumed, {settings}", resumed_trainer, folder / f"fsdp2 {settings}", settings)

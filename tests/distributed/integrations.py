"""What every process of a test does through the Trainer, accelerate, peft and Lightning.

With one process the part is the whole batch, as in :mod:`tests.distributed.setups`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from tests import accelerate_state
from tests.distributed import setups
from tests.passes import wrap
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD, Anchor, MDGDOptimizer, StepProject, TopK, mdgd_backward
from torch_mdgd.backward import find_optimizer
from torch_mdgd.integrations.lightning import MDGDModuleMixin
from torch_mdgd.integrations.transformers import MDGDTrainer

SETTINGS: dict[str, dict[str, Any]] = {
    "published": {},
    "compact": {"mask": TopK(0.2), "compact": True},
    "step": {"rule": StepProject(restore=0.1)},
    "anchor and lazy": {
        "rule": lambda model: Anchor(model, 0.5, rank=None, warmup=2, rule=MDGD(0.5, regularize=0, every=2))
    },
}
# Steps of two micro-batches, of four rows over all ranks.
STEPS, MICRO_BATCHES, CLIP = 3, 2, 0.05


def environment(rank: int, world: int) -> None:
    """What torchrun sets."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict(zip(names, map(str, (rank, rank, world, world)), strict=True))
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29512", "OMP_NUM_THREADS": "1"}


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Not Adam, which enlarges the rounding of L_v, taken in float32, where a gradient is small."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    return {"weights": weights, "diagnostics": find_optimizer(optimizer).diagnostics, **more}


# transformers.


def rows() -> list[dict[str, Tensor]]:
    """Answers of different lengths, so that a mean over tokens is not that over ranks; rows without a picture."""
    out = []
    for seed in range(4 * MICRO_BATCHES * (STEPS + 1)):
        row = {name: x[0] for name, x in llava_batch(seed, images=1).items()}
        row["labels"][-1 - seed % 3 :] = row["input_ids"][-1 - seed % 3 :]
        if seed % 4 > 1 and seed % 8 < 4:
            row["input_ids"] = row["input_ids"].clamp(max=29)
            del row["pixel_values"]
        out.append(row)
    return out


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = {name for row in rows for name in row}
    out = {name: torch.stack([row[name] for row in rows if name in row]) for name in names}
    return {name: x.double() if name == "pixel_values" else x for name, x in out.items()}


def trainer(
    world: int,
    folder: Path,
    settings: str,
    dropout: float = 0.0,
    resume: str | None = None,
    diagnose_every: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    with accelerate_state.fresh():
        model = llava(dropout=dropout).double()
        model.model.vision_tower.requires_grad_(False)
        if resume is not None:
            # Nothing may depend on the weights before those of the checkpoint.
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)
        arguments = {
            "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4 // world,
            "gradient_accumulation_steps": MICRO_BATCHES, "max_grad_norm": CLIP, "use_cpu": True, "report_to": [],
            "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 3,
            "train_sampling_strategy": "sequential",
        }  # fmt: skip
        found = MDGDTrainer(
            model=model, args=TrainingArguments(**{**arguments, **more}), train_dataset=rows(), data_collator=collate,
            optimizers=(sgd(model), None), **SETTINGS[settings], alignment="mse", effective_rank_steps=1,
            diagnose_every=diagnose_every,
        )  # fmt: skip
        found.train(resume_from_checkpoint=resume)
        kept = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
        logs = [{k: v for k, v in entry.items() if k not in kept} for entry in found.state.log_history]
        return outcome(model, found.optimizer, logs=logs)


def resumed_trainer(folder: Path, settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Uninterrupted, and gone on with after two steps."""
    # What was measured last before a checkpoint is not in it.
    more = {"dropout": 0.2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "diagnose_every": 1}
    whole = trainer(2, folder, settings, **more)
    return whole, trainer(2, folder, settings, **more, resume=str(folder / "checkpoint-2"))


# accelerate and peft.


def adapted() -> nn.Module:
    config = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)")
    base = llava().double()
    torch.manual_seed(1)
    return get_peft_model(base, config).double()


def accelerated(rank: int, world: int, settings: str, lora: bool) -> dict[str, Any]:
    with accelerate_state.fresh():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
        net = adapted() if lora else setups.tiny_llava()
        optimizer = wrap(sgd(net), net, **SETTINGS[settings])
        model, optimizer = accelerator.prepare(net, optimizer)
        for step in range(STEPS * MICRO_BATCHES):
            with accelerator.accumulate(model):
                mdgd_backward(
                    model, optimizer, part(step, rank, world), weight=1 / MICRO_BATCHES, alignment="mse",
                    combine=accelerator.sync_gradients, scaler=accelerator.scaler,
                )  # fmt: skip
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        assert (type(model) is DistributedDataParallel) == (world > 1)
        return outcome(net, optimizer)


def part(step: int, rank: int, world: int) -> dict[str, Tensor]:
    return setups.llava_part(step, rank, world, setups.SOME_WITHOUT[step % len(setups.SOME_WITHOUT)])


# Lightning.


class Automatic(MDGDModuleMixin, LightningModule):
    """Automatic optimization."""

    def __init__(self, settings: str) -> None:
        super().__init__()
        self.model, self.settings = setups.tiny_llava().train(), SETTINGS[settings]

    def configure_optimizers(self) -> MDGDOptimizer:
        return wrap(sgd(self.model), self.model, **self.settings)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.mdgd_backward(self.model, batch, alignment="mse")

    def on_train_batch_end(self, *args: object) -> None:
        # A step that does not go through mdgd_backward may follow.
        assert getattr(self.trainer.model, "require_backward_grad_sync", True)


class Manual(Automatic):
    """Manual optimization; ``told`` says whether the optimizer knows of the other processes."""

    told = True

    def __init__(self, settings: str) -> None:
        super().__init__(settings)
        self.automatic_optimization = False

    def on_train_start(self) -> None:
        if self.told and self.trainer.world_size > 1:
            self.optimizers().optimizer.average_over(self.trainer.model.process_group)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer, last = self.optimizers(), batch_idx % MICRO_BATCHES == MICRO_BATCHES - 1
        mdgd_backward(self.model, optimizer, batch, weight=1 / MICRO_BATCHES, combine=last, alignment="mse")
        if last:
            self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


class Untold(Manual):
    """Manual optimization as in one process."""

    told = False


def lightning(rank: int, world: int, folder: Path, settings: str, kind: type[Automatic] = Automatic) -> dict[str, Any]:
    module = kind(settings)
    options = {} if issubclass(kind, Manual) else {
        "accumulate_grad_batches": MICRO_BATCHES, "gradient_clip_val": CLIP
    }  # fmt: skip
    found = LightningTrainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    batches = [part(step, rank, world) for step in range(STEPS * MICRO_BATCHES)]
    found.fit(module, DataLoader(batches, batch_size=None))
    return outcome(module.model, found.optimizers[0])


# How a framework averages depends on a rule's passes alone: in each there is the published rule, whose passes are the
# most, and a rule whose passes are fewer or change from step to step. The Trainer runs all.
ACCELERATED = [
    ("published", False),
    ("step", False),
    ("anchor and lazy", False),
    ("compact", True),
    ("anchor and lazy", True),
]
WITH_LIGHTNING: list[tuple[str, type[Automatic]]] = [
    ("published", Automatic),
    ("compact", Automatic),
    ("anchor and lazy", Automatic),
    ("published", Manual),
    ("step", Manual),
]


class Bare(DDPStrategy):
    """Starts processes and leaves the model as it is."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model


def another_strategy(folder: Path) -> None:
    """Two processes that Lightning does not put a model in DistributedDataParallel for."""
    module = Automatic("published")
    found = LightningTrainer(
        accelerator="cpu", devices=2, strategy=Bare(), max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    found.fit(module, DataLoader([part(0, 0, 2)], batch_size=None))

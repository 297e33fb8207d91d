"""Fine-tuning with transformers' Trainer, taken up where a killed run left its last checkpoint."""

import gc
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from reproductions.methods import Method
from reproductions.methods.base import Divergence, Penalty
from reproductions.paper.config import Experiment
from reproductions.paper.run import ranks
from reproductions.paper.run.sparing import OPTIMIZERS, in_full, prepare, trained_values
from reproductions.paper.run.weights import CHECKPOINTS, NAME, changes, load_changes, save_changes
from reproductions.paper.run.work import Workshop
from reproductions.paper.run.workers import errors_of_workers
from reproductions.shared.files import FileError, named, read_json, read_until_cut, write
from torch_mdgd import last_decoder_layers
from torch_mdgd.integrations.transformers import MDGDTrainerMixin
from torch_mdgd.parallel.dtensor import shard_like, whole

LOG, TRAINED = "training.jsonl", "trained_parameters.safetensors"
COUNTS = "trained.json"
TENSORBOARD = "tensorboard"
LOGGED = ("visual_loss", "cos_task_visual", "cos_task_reference", "kept_fraction", "visual_to_task")


class SmallCheckpoints:
    """Before a Trainer: checkpoints hold what is trained and nothing else, by the names in the model.

    Besides being a sixth of the size, they load in every family: the Trainer's own loads LLaVA's by other names than it
    saved them.

    Attributes:
        autocast: whether passes are in bfloat16, since frozen weights are.
    """

    autocast = False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trainer: Any = self
        folder = Path(output_dir or trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: whole(p.detach()).contiguous() for name, p in _trained(trainer.model)}
        if ranks.is_first():
            save_file(values, folder / TRAINED)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        parent: Any = super()
        if not trainer.is_fsdp_enabled:
            parent._save_optimizer_and_scheduler(output_dir)
            return
        # It would write all weights beside the optimizer, and asks nobody for those that are trained.
        names: Any = transformers.trainer
        save = names.save_fsdp_model
        names.save_fsdp_model = lambda *args, **kwargs: None
        try:
            parent._save_optimizer_and_scheduler(output_dir)
        finally:
            names.save_fsdp_model = save
        self._save(output_dir)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trainer: Any = self
        path = Path(resume_from_checkpoint) / TRAINED
        with named(path.parent, "a whole checkpoint"):
            saved = load_file(path)
        for name, p in _trained(trainer.model if model is None else model):
            if name not in saved:
                raise FileError(f"{path} lacks {name}: it is of another run, so remove {path.parent}")
            p.copy_(shard_like(saved[name], p))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trainer: Any = super()
        with named(Path(checkpoint or ""), "a whole checkpoint"):
            trainer._load_optimizer_and_scheduler(checkpoint)

    def compute_loss_context_manager(self) -> Any:
        """Under FSDP2 it is told of no mixed precision: it would send gradients in 16 bits."""
        trainer: Any = self
        parent: Any = super()
        if trainer.is_fsdp_enabled:
            return torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=self.autocast)
        return parent.compute_loss_context_manager()


class PaperTrainer(SmallCheckpoints, Trainer):
    """The Trainer, with a penalty or a divergence that may be added to its loss."""

    penalty: Penalty | None = None
    divergence: Divergence | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The task loss, and what is added to it once a step."""
        diverged = None if self.divergence is None else self.divergence(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # A loss over all tokens of a step is not divided by the number of passes afterwards.
        once = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        passes = self.current_gradient_accumulation_steps if once else 1
        if self.penalty is not None:
            loss = loss + self.penalty() / passes
        if diverged is not None:
            loss = loss + diverged(outputs) / passes
        return (loss, outputs) if return_outputs else loss


class PaperMDGDTrainer(SmallCheckpoints, MDGDTrainerMixin, Trainer):
    """The same around MDGD."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Some weights are float32 by now and some are not, and a rule may run the model to see what enters layers."""
        settings: Any = self.args
        with torch.autocast(settings.device.type, torch.bfloat16, enabled=self.autocast):
            return super().create_optimizer(*args, **kwargs)


class LogLines(TrainerCallback):
    """Writes each training log as a line of JSON; lines of steps that are taken again are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what was logged up to the checkpoint."""
        lines = read_until_cut(self.path)
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= state.global_step]
        write(self.path, "".join(kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add a line."""
        if logs and "loss" in logs:
            line = {"step": state.global_step} | {
                name: float(logs[name]) for name in ("loss", *LOGGED, "grad_norm", "learning_rate") if name in logs
            }
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def train(
    work: Workshop,
    method: Method,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    begin: Path | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Fine-tune the workshop's model, and write what changed to ``trained.safetensors``, counted in ``trained.json``.

    Several processes train together; the first alone finishes and writes.

    Args:
        work: its model has the published weights, and afterwards, in the first process, the fine-tuned ones.
        method: how.
        folder: of the run; checkpoints of a killed run there are taken up.
        callbacks: more for the Trainer.
        begin: what another method changed, in place of training; for methods that begin with another's result.
        progress: whether to show a bar.

    Returns:
        what ``trained.json`` holds: how many numbers might change, and how many did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(work.experiment.seed)
    t, module, values = work.experiment.training, None, None
    if begin is None:
        module = _train(work, method, folder, callbacks, progress)
        # The Trainer is a cycle, which holds the optimizer's state on the device.
        gc.collect()
        if t.quantize != "none" or t.shard:
            # There is no room for this module and the one in full.
            values, module = trained_values(module), None
    if ranks.is_first():
        if begin is not None:
            load_changes(work.network, begin)
            module = method.mark(work.network, work.layers)
        elif values is not None:
            module = in_full(work, method, values)
        assert module is not None
        _finish(work, method, folder, module)
    ranks.wait()
    counts: dict[str, int] = read_json(folder / COUNTS)
    return counts


def _finish(work: Workshop, method: Method, folder: Path, module: nn.Module) -> None:
    """What follows training, in one process: the method's own end, and the files."""
    trained = method.trained(module)
    method.finish(work, module)
    published, network = work.pretrained, work.network
    for name, p in network.named_parameters():
        p.data = p.data.to(published[name].dtype)
    network.requires_grad_(False).eval()
    changed, count = changes(network, published)
    write(folder / COUNTS, json.dumps({"trained_numbers": trained, "changed_numbers": count}))
    save_changes(changed, folder / NAME)


def _train(
    work: Workshop, method: Method, folder: Path, callbacks: Sequence[TrainerCallback], progress: bool
) -> nn.Module:
    e, network = work.experiment, work.network
    module = prepare(work, method)
    for _, p in _trained(module):
        p.data = p.data.float()
    if e.training.checkpointing:
        enable: Any = network.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    examples = method.examples(work, work.training_examples(), e.training.batch * e.training.accumulation)
    common: dict[str, Any] = {
        "model": module,
        "args": arguments(e, method, folder, work.device, progress, **(sharding(network) if e.training.shard else {})),
        "train_dataset": examples,
        "data_collator": lambda some: work.model.collate(some, answers=True),
        "callbacks": [*([LogLines(folder / LOG)] if ranks.is_first() else []), *callbacks],
    }
    wrapper = method.wrapper(module, work)
    trainer: PaperTrainer | PaperMDGDTrainer
    if wrapper is None:
        trainer = PaperTrainer(**common)
        # Some weights are float32 by now and some are not.
        with torch.autocast(work.device.type, torch.bfloat16, enabled=e.dtype == "bfloat16"):
            trainer.penalty = method.penalty(work, module)
            trainer.divergence = method.divergence(work, module)
    else:
        offload = e.training.reference == "cpu" and not method.compact
        trainer = PaperMDGDTrainer(**common, **wrapper, offload=offload, tap=work.model.tap())
    trainer.autocast = e.dtype == "bfloat16"
    if e.training.report_to == TENSORBOARD and ranks.is_first():
        # Told where to write: by itself it writes beside the checkpoints, which are removed at the end.
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(folder / TENSORBOARD))))
    if not progress:
        trainer.remove_callback(PrinterCallback)
    begun = ranks.agree(last_checkpoint(folder / CHECKPOINTS))
    if begun is not None and _is_final(Path(begun)):
        # The Trainer would take a step more: it asks whether to stop after each, not before.
        trainer._load_from_checkpoint(begun)
    else:
        with errors_of_workers():
            trainer.train(resume_from_checkpoint=begun)
    if e.training.checkpointing:
        disable: Any = network.gradient_checkpointing_disable
        disable()
    return module


def arguments(
    experiment: Experiment, method: Method, folder: Path, device: torch.device, progress: bool, **more: Any
) -> TrainingArguments:
    """The Trainer's settings of a run, and more of them."""
    t = experiment.training
    if t.optimizer in OPTIMIZERS:
        more["optim"] = OPTIMIZERS[t.optimizer]
    out = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        num_train_epochs=t.epochs,
        max_steps=t.steps or -1,
        learning_rate=method.settings.learning_rate or method.rate * t.learning_rate,
        lr_scheduler_type=t.schedule,
        warmup_steps=t.warmup if t.warmup < 1 else 0.999,
        weight_decay=t.weight_decay,
        max_grad_norm=t.clip,
        per_device_train_batch_size=t.batch,
        gradient_accumulation_steps=t.accumulation // ranks.world(),
        bf16=experiment.dtype == "bfloat16" and not t.shard,
        save_strategy="steps",
        save_steps=t.save_every,
        save_total_limit=1,
        logging_steps=t.log_every,
        dataloader_num_workers=t.workers,
        remove_unused_columns=False,
        report_to=[] if t.report_to in ("none", TENSORBOARD) else [t.report_to],
        run_name=f"{experiment.name} {method.name}",
        seed=experiment.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        disable_tqdm=not progress,
        **more,
    )
    # One process is one GPU: several would be DataParallel, which the passes of MDGD do not support.
    out._n_gpu = min(out.n_gpu, 1)
    return out


def sharding(network: nn.Module) -> dict[str, Any]:
    """The Trainer's settings that split a network over all processes, decoder layer by decoder layer."""
    (layer,) = last_decoder_layers(network, 1)
    wrapped = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": [type(layer).__name__]}
    config = {"version": 2, **wrapped, "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False}
    return {"fsdp": True, "fsdp_config": config}


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; one that a kill cut short is passed over."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            shutil.rmtree(path, ignore_errors=True)
            continue
        return str(path)
    return None


def _is_final(checkpoint: Path) -> bool:
    state = read_json(checkpoint / "trainer_state.json", "global_step", "max_steps")
    return bool(state["global_step"] >= state["max_steps"])


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]

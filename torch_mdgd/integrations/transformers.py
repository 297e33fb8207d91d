"""``MDGDTrainer``: the Trainer of transformers, with the passes of MDGD in its training step."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from torch_mdgd.backward import find_optimizer, mdgd_backward
from torch_mdgd.diagnostics import effective_rank
from torch_mdgd.masks.base import Mask
from torch_mdgd.models.tap import Batch, VisualTap
from torch_mdgd.optimizer import MDGDOptimizer
from torch_mdgd.rules.base import Rule

# What TRL's trainers count in every call of compute_loss; it is called once for each forward pass.
COUNTERS = ("_metrics", "_total_train_tokens")


class MDGDTrainerMixin:
    """Put before any Trainer: ``class MDGDSFTTrainer(MDGDTrainerMixin, SFTTrainer)``.

    The optimizer that the Trainer makes, or is given, is wrapped when training begins: the reference φ is the model's
    weights then, and on resume those of the checkpoint. Every step takes the passes of
    :func:`~torch_mdgd.mdgd_backward` with the Trainer's own ``compute_loss``, so its label smoothing, loss function,
    mixed precision, clipping and gradient accumulation hold; L_v is a mean over micro-batches.

    In several processes (DistributedDataParallel, by torchrun or accelerate) the update is that of one process with all
    ranks' batches, and so are diagnostics.

    With each of the Trainer's training logs go :attr:`MDGDOptimizer.diagnostics` of its last step (``visual_loss`` of
    its last micro-batch), by their names.

    Resuming also loads weights whose names in the checkpoint are not those in the model, as of LLaVA, which the
    Trainer skips with a warning.

    Args:
        *args: the Trainer's own, like all keywords but these.
        rule: of the :class:`MDGDOptimizer`, or a function of the model that returns it; ``MDGD()`` if None.
        mask: of the :class:`MDGDOptimizer`.
        compact: of the :class:`MDGDOptimizer`.
        tap: where z comes from; ``VisualTap.for_model(model)`` if None.
        alignment: the form of L_v (5).
        effective_rank_steps: add the effective rank (4) of z to the log, measured every so many steps; 0 for never. It
            takes a singular value decomposition of a matrix (image tokens in the micro-batch, hidden).
        **kwargs: the Trainer's own.

    Raises:
        TypeError: the model is not one of transformers, and ``tap`` is None; a class that puts this behind the Trainer.
        ValueError: settings of the Trainer that the passes do not support, naming them.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(MDGDTrainerMixin):
            raise TypeError(
                f"class {cls.__name__}: put MDGDTrainerMixin before the Trainer, whose own training step runs otherwise"
            )

    def __init__(
        self,
        *args: Any,
        rule: Rule | Callable[[nn.Module], Rule] | None = None,
        mask: Mask | None = None,
        compact: bool = False,
        tap: VisualTap | None = None,
        alignment: Literal["l1", "mse"] = "l1",
        effective_rank_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.mdgd_rule, self.mdgd_mask, self.mdgd_compact = rule, mask, compact
        self._given_tap = tap
        self.mdgd_tap = _watching(tap, trainer.model)
        self.mdgd_alignment: Literal["l1", "mse"] = alignment
        self.effective_rank_steps = effective_rank_steps
        _refuse_unsupported(trainer)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, wrapped once."""
        trainer: Any = super()
        optimizer: Any = trainer.create_optimizer(*args, **kwargs)
        inner = optimizer
        while not isinstance(inner, MDGDOptimizer) and hasattr(inner, "optimizer"):
            inner = inner.optimizer
        if not isinstance(inner, MDGDOptimizer):
            rule: Any = self.mdgd_rule
            if rule is not None and not isinstance(rule, Rule):
                rule = rule(self.model)  # type: ignore[attr-defined]
            optimizer = MDGDOptimizer(optimizer, rule, mask=self.mdgd_mask, compact=self.mdgd_compact)
            vars(self)["optimizer"] = optimizer
            # With model_init every call of train() has a model of its own.
            self.mdgd_tap = _watching(self._given_tap, self.model)  # type: ignore[attr-defined]
        elif inner is optimizer and (self.mdgd_rule or self.mdgd_mask or self.mdgd_compact):
            raise ValueError(
                "MDGDTrainer: the optimizer is an MDGDOptimizer already: leave out rule and mask, or pass its base"
            )
        wrapped: torch.optim.Optimizer = optimizer
        return wrapped

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """All passes over one micro-batch; d is in ``.grad`` after the last of a step."""
        trainer: Any = self
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()
        batch = trainer._prepare_inputs(inputs)
        micro_batches = trainer.current_gradient_accumulation_steps
        normalised = getattr(trainer, "loss_is_scaled_for_ga", None)
        if normalised is None:
            normalised = trainer.compute_loss_func is not None or (
                trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            )
        counters = copy.deepcopy({name: getattr(self, name) for name in COUNTERS if hasattr(self, name)})

        def loss(batch: Batch) -> Tensor:
            # The last forward pass is the one at θ: what it counts stays.
            for name, value in counters.items():
                setattr(self, name, copy.deepcopy(value))
            with trainer.compute_loss_context_manager():
                out: Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch)
            return out if normalised else out / micro_batches

        with getattr(self, "maybe_activation_offload_context", nullcontext()):
            out = mdgd_backward(
                model,
                trainer.optimizer,
                batch,
                tap=self.mdgd_tap,
                loss=loss,
                alignment=self.mdgd_alignment,
                visual_weight=1 / micro_batches,
                scaler=trainer.accelerator.scaler,
                combine=trainer.accelerator.sync_gradients,
            )
        self._measure_rank(trainer)
        return out

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with diagnostics if this is about training."""
        trainer: Any = self
        if "loss" in logs:
            logs = {**logs, **find_optimizer(trainer.optimizer).diagnostics}
        parent: Any = super()
        parent.log(logs, *args, **kwargs)

    def _measure_rank(self, trainer: Any) -> None:
        z, every, accelerator = self.mdgd_tap.z, self.effective_rank_steps, trainer.accelerator
        if every and accelerator.sync_gradients and (trainer.state.global_step + 1) % every == 0:
            if z is not None:
                # Rows of zeros change no singular value.
                z = accelerator.gather(accelerator.pad_across_processes(z.contiguous()))
            rank = effective_rank(z) if z is not None and z.numel() and z.isfinite().all() and z.any() else float("nan")
            found = torch.tensor(rank, dtype=torch.float64, device="cpu")
            find_optimizer(trainer.optimizer).record(effective_rank=found)
        self.mdgd_tap.z = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trainer: Any = self
        model = trainer.model if model is None else model
        if isinstance(model, PreTrainedModel) and not trainer.is_fsdp_enabled:
            load_weights(model, resume_from_checkpoint)
        else:
            parent: Any = super()
            parent._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        trainer: Any = self
        if isinstance(trainer.model, PreTrainedModel) and not trainer.is_fsdp_enabled:
            load_weights(trainer.model, trainer.state.best_model_checkpoint)
        else:
            parent: Any = super()
            parent._load_best_model()


class MDGDTrainer(MDGDTrainerMixin, Trainer):
    """The Trainer of transformers around MDGD: see :class:`MDGDTrainerMixin` for its own arguments."""


@torch.no_grad()
def load_weights(model: PreTrainedModel, path: str) -> None:
    """Load what ``save_pretrained`` wrote into a model, by the names that it reads: all of it, or an error.

    The Trainer loads by the names in the model, and ``save_pretrained`` writes older ones for many families (LLaVA,
    Qwen2-VL): it then loads nothing, with a warning. Takes a copy of the model in main memory for a while.

    Args:
        model: stays where it is; its parameters get the saved values.
        path: a folder.

    Raises:
        ValueError: a weight is missing or has another shape, naming one.
    """
    dtypes = {x.dtype for x in model.state_dict().values() if x.is_floating_point()}
    # The widest dtype takes all others without rounding.
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    dtype = dtypes.pop() if len(dtypes) == 1 else widest
    loaded: Any = type(model).from_pretrained(
        path, config=copy.deepcopy(model.config), dtype=dtype, output_loading_info=True
    )
    saved, info = loaded
    lacking = sorted(info["missing_keys"]) + sorted(str(x) for x in info["mismatched_keys"])
    if lacking:
        raise ValueError(f"{path} does not hold the weights of this {type(model).__name__}: it lacks {lacking[0]}")
    model.load_state_dict(saved.state_dict())


class _Watching(VisualTap):
    """A tap that remembers the features of the last forward pass, which is the one at θ."""

    def __init__(self, tap: VisualTap) -> None:
        self.tap, self.mask, self.text_module = tap, tap.mask, tap.text_module
        self.z: Tensor | None = None

    def __call__(self, model: Any, batch: Batch) -> tuple[Any, Tensor]:
        output, z = self.tap(model, batch)
        self.z = z.detach()
        return output, z

    def features(self, model: Any, batch: Batch, *, whole: bool = False) -> Tensor:
        return self.tap.features(model, batch, whole=whole)


def _watching(tap: VisualTap | None, model: nn.Module) -> _Watching:
    return _Watching(tap or VisualTap.for_model(model))


def _refuse_unsupported(trainer: Any) -> None:
    args = trainer.args
    # Older releases of transformers have the second name alone.
    kind = "activation" if hasattr(args, "activation_checkpointing") else "gradient"
    checkpointing = getattr(args, f"{kind}_checkpointing") and getattr(args, f"{kind}_checkpointing_kwargs")
    found = {
        "deepspeed": trainer.is_deepspeed_enabled,
        "DataParallel (several GPUs in one process; use one, or torchrun)": args.n_gpu > 1,
        "FSDP, whose plugin wraps and saves the model its own way (use DDP, or fully_shard in a loop of your own)": (
            trainer.is_fsdp_enabled
        ),
        "context or sequence parallelism": getattr(trainer.accelerator, "parallelism_config", None) is not None,
        "checkpointing with use_reentrant=True, which drops gradients silently (use False)": (
            (checkpointing or {}).get("use_reentrant", False)
        ),
        "optimizers that step during the backward pass (LOMO, layerwise ones)": (
            any(kind in str(args.optim).lower() for kind in ("lomo", "layerwise"))
        ),
    }
    for name, present in found.items():
        if present:
            raise ValueError(f"MDGDTrainer does not support {name}")

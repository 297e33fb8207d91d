"""``MDGDTrainer``: the Trainer of transformers, with the passes of MDGD in its training step."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from torch_mdgd.backward import find_optimizer, mdgd_backward
from torch_mdgd.diagnostics import effective_rank
from torch_mdgd.integrations.written import written_mask, written_rule
from torch_mdgd.masks.base import Mask
from torch_mdgd.models.tap import Batch, VisualTap
from torch_mdgd.optimizer import MDGDOptimizer
from torch_mdgd.rules.base import Rule

# What TRL's trainers count in every call of compute_loss; it is called once for each forward pass.
COUNTERS = ("_metrics", "_total_train_tokens")
# How often g and v are taken apart for the log, at most, unless it is said.
SPARING = 10

NO_REFERENCE = (
    "MDGDTrainer: the checkpoint has no optimizer state (save_only_model), so φ is the fine-tuned weights in it, not "
    "those that training began with. Save the state too; or hand over an optimizer that was wrapped before they were "
    "loaded, optimizers=(MDGDOptimizer(base, rule), None); or call set_reference(values) of the MDGDOptimizer in a "
    "callback's on_train_begin, with a value for each of its parameters, in their order"
)
AGAIN = (
    "MDGDTrainer: train() is called again with the optimizer of the first call, so φ is still the weights before that, "
    "unless a checkpoint brings its own. For a next task make a new trainer, or call "
    "find_optimizer(trainer.optimizer).set_reference() of torch_mdgd.backward"
)


class MDGDTrainerMixin:
    """Put before any Trainer: ``class MDGDSFTTrainer(MDGDTrainerMixin, SFTTrainer)``.

    The optimizer that the Trainer makes, or is given, is wrapped when training begins: the reference φ is the model's
    weights then, and on resume those of the checkpoint. Every step takes the passes of
    :func:`~torch_mdgd.mdgd_backward` with the Trainer's own ``compute_loss``, so its label smoothing, loss function,
    mixed precision, clipping and gradient accumulation hold; L_v is a mean over micro-batches.

    In several processes (DistributedDataParallel, by torchrun or accelerate) the update is that of one process with all
    ranks' batches, and so are diagnostics.

    The training steps of the Trainers behind this one are run, and may count or time; their backward pass is replaced.

    With each of the Trainer's training logs go :attr:`MDGDOptimizer.diagnostics` of its last step (``visual_loss`` of
    its last micro-batch), by their names.

    With FSDP2 (``fsdp=True``, ``fsdp_config={"version": 2, ...}``) parameters, φ and masks are sharded, and rules are
    those of one process.

    With a ``deepspeed`` configuration of ZeRO-1, 2 or 3 the rule is given to a
    :class:`~torch_mdgd.integrations.deepspeed.MDGDEngine` around the engine, :attr:`mdgd_engine`; the optimizer stays
    DeepSpeed's. Rules that correct parameters after the step, and masks, are refused there.

    Resuming also loads weights whose names in the checkpoint are not those in the model, as of LLaVA, which the
    Trainer skips with a warning.

    Args:
        *args: the Trainer's own, like all keywords but these.
        rule: of the :class:`MDGDOptimizer`, or a function of the model that returns it, or text such as
            ``"MDGD(3.0, regularize=0)"``; ``MDGD()`` if None.
        mask: of the :class:`MDGDOptimizer`, or text such as ``"Random(0.1)"``.
        compact: of the :class:`MDGDOptimizer`.
        offload: of the :class:`MDGDOptimizer`.
        tap: where z comes from; ``VisualTap.for_model(model)`` if None.
        alignment: the form of L_v (5).
        effective_rank_steps: add the effective rank (4) of z to the log, measured every so many steps; 0 for never. It
            takes a singular value decomposition of a matrix (image tokens in the micro-batch, hidden).
        separate: as of :func:`~torch_mdgd.mdgd_backward`.
        diagnose_every: after how many steps g and v are taken apart, for ``cos_task_visual`` and ``visual_to_task`` of
            the log, where one backward pass would do; 0 for never. If None, at steps that are logged, and no more often
            than every tenth; with DeepSpeed, where it takes longer, never.
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
        rule: Rule | Callable[[nn.Module], Rule] | str | None = None,
        mask: Mask | str | None = None,
        compact: bool = False,
        offload: bool = False,
        tap: VisualTap | None = None,
        alignment: Literal["l1", "mse"] = "l1",
        effective_rank_steps: int = 0,
        separate: bool = False,
        diagnose_every: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.mdgd_rule = written_rule(rule) if isinstance(rule, str) else rule
        self.mdgd_mask = written_mask(mask) if isinstance(mask, str) else mask
        self.mdgd_compact, self.mdgd_offload = compact, offload
        self._given_tap = tap
        self.mdgd_tap = _watching(tap, trainer.model)
        self.mdgd_alignment: Literal["l1", "mse"] = alignment
        self.effective_rank_steps = effective_rank_steps
        self.mdgd_separate, self.diagnose_every = separate, diagnose_every
        self._began_before = False
        # Of DeepSpeed: see :class:`torch_mdgd.integrations.deepspeed.MDGDEngine`.
        self.mdgd_engine: Any = None
        # Whether φ was taken by create_optimizer, which follows the weights of a checkpoint.
        self._wrapped_after_loading = False
        _refuse_unsupported(trainer)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, wrapped once."""
        trainer: Any = super()
        optimizer: Any = trainer.create_optimizer(*args, **kwargs)
        inner = _inside(optimizer)
        if self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            if inner is not None:
                raise ValueError("MDGDTrainer with DeepSpeed: pass the plain optimizer, and rule= beside it")
            # The rule goes around the engine.
            plain: torch.optim.Optimizer = optimizer
            return plain
        self._wrapped_after_loading = inner is None
        if inner is None:
            optimizer = MDGDOptimizer(
                optimizer, self._new_rule(), mask=self.mdgd_mask, compact=self.mdgd_compact, offload=self.mdgd_offload
            )
            vars(self)["optimizer"] = optimizer
            # With model_init every call of train() has a model of its own.
            self.mdgd_tap = _watching(self._given_tap, self.model)  # type: ignore[attr-defined]
        elif inner is optimizer and (self.mdgd_rule or self.mdgd_mask or self.mdgd_compact or self.mdgd_offload):
            raise ValueError(
                "MDGDTrainer: the optimizer is an MDGDOptimizer already: leave out rule and mask, or pass its base"
            )
        elif self._began_before:
            warnings.warn(AGAIN, stacklevel=2)
        self._began_before = True
        wrapped: torch.optim.Optimizer = optimizer
        return wrapped

    def _new_rule(self) -> Rule | None:
        rule: Any = self.mdgd_rule
        return rule if rule is None or isinstance(rule, Rule) else rule(self.model)  # type: ignore[attr-defined]

    def _engine_of(self, model: nn.Module) -> Any:
        """The rule around DeepSpeed's engine, which is new in each call of ``train``."""
        if self.mdgd_engine is None or self.mdgd_engine.engine is not model:
            from torch_mdgd.integrations.deepspeed import MDGDEngine

            self.mdgd_tap = _watching(self._given_tap, self.model)  # type: ignore[attr-defined]
            self.mdgd_engine = MDGDEngine(model, self._new_rule(), tap=self.mdgd_tap, alignment=self.mdgd_alignment)
        return self.mdgd_engine

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's own, with all passes over one micro-batch; d is in ``.grad`` after the last of a step.

        Raises:
            RuntimeError: the training step of a Trainer behind this one has a backward pass of its own.
        """
        trainer: Any = self
        parent: Any = super()
        forward, context = trainer.compute_loss, trainer.compute_loss_context_manager
        losses: list[Tensor] = []

        def compute_loss(model: nn.Module, inputs: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Tensor:
            if losses:
                raise RuntimeError(f"{type(self).__name__}: its training step calls compute_loss more than once")
            losses.append(self._passes(model, inputs, num_items_in_batch, forward, context))
            return losses[0]

        def backward(*_: Any, **__: Any) -> None:
            if not losses:
                raise RuntimeError(
                    f"{type(self).__name__}: its training step has a backward pass of its own, on no loss of "
                    "compute_loss, whose gradients nobody would capture: use that Trainer without this mixin, with "
                    "mdgd_backward or torch_mdgd.loss in its place"
                )

        # The passes enter the context one by one.
        replaced = {"compute_loss": compute_loss, "compute_loss_context_manager": nullcontext}
        with _replaced(self, **replaced), _replaced(trainer.accelerator, backward=backward):
            out: Tensor = parent.training_step(model, inputs, num_items_in_batch)
        self._measure_rank(trainer)
        return out

    def _passes(self, model: nn.Module, batch: Batch, num_items: Any, forward: Any, context: Any) -> Tensor:
        """All passes over one micro-batch; returns what ``compute_loss`` does."""
        trainer: Any = self
        micro_batches = trainer.current_gradient_accumulation_steps
        normalised = getattr(trainer, "loss_is_scaled_for_ga", None)
        if normalised is None:
            normalised = trainer.compute_loss_func is not None or (
                trainer.model_accepts_loss_kwargs and num_items is not None
            )
        counters = copy.deepcopy({name: getattr(self, name) for name in COUNTERS if hasattr(self, name)})
        found: list[Tensor] = []

        def loss(batch: Batch) -> Tensor:
            # The last forward pass is the one at θ: what it counts stays.
            for name, value in counters.items():
                setattr(self, name, copy.deepcopy(value))
            with context():
                out: Tensor = forward(model, dict(batch), num_items_in_batch=num_items)
            found[:] = [out.detach()]
            return out if normalised else out / micro_batches

        if trainer.is_deepspeed_enabled:
            last = trainer.accelerator.sync_gradients
            self._engine_of(model).backward(
                batch,
                loss=loss,
                visual_weight=1 / micro_batches,
                boundary=last,
                scale_wrt_gas=False,
                separate=self.mdgd_separate or (bool(self.diagnose_every) and self._is_measured(trainer)),
            )
            if last:
                # As accelerate's backward does.
                model.step()  # type: ignore[operator]
            return found[0]
        mdgd_backward(
            model,
            trainer.optimizer,
            batch,
            tap=self.mdgd_tap,
            loss=loss,
            alignment=self.mdgd_alignment,
            visual_weight=1 / micro_batches,
            scaler=trainer.accelerator.scaler,
            combine=trainer.accelerator.sync_gradients,
            separate=self.mdgd_separate or self._is_measured(trainer),
        )
        return found[0]

    def _is_measured(self, trainer: Any) -> bool:
        """Whether g and v are taken apart for the log of this step."""
        every = self.diagnose_every
        if every is None:
            logged = max(1, int(trainer.state.logging_steps or 1))
            every = -(-SPARING // logged) * logged
        return every > 0 and (trainer.state.global_step + 1) % every == 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with diagnostics if this is about training."""
        trainer: Any = self
        told = _inside(trainer.optimizer) or self.mdgd_engine
        if "loss" in logs and told is not None:
            logs = {**logs, **told.diagnostics}
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
            (self.mdgd_engine or find_optimizer(trainer.optimizer)).record(effective_rank=found)
        self.mdgd_tap.z = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        parent: Any = super()
        trainer: Any = self
        if trainer.is_deepspeed_enabled:
            parent._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self._engine_of(trainer.model_wrapped).load(checkpoint)
            return
        wrapped, before = find_optimizer(trainer.optimizer), self._wrapped_after_loading
        loaded: list[Any] = []
        handle = wrapped.register_load_state_dict_post_hook(loaded.append)
        parent._load_optimizer_and_scheduler(checkpoint)
        handle.remove()
        if checkpoint is not None and before and not loaded:
            warnings.warn(NO_REFERENCE, stacklevel=2)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        parent: Any = super()
        parent._save_optimizer_and_scheduler(output_dir)
        if self.mdgd_engine is not None:
            self.mdgd_engine.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trainer: Any = self
        model = trainer.model if model is None else model
        if isinstance(model, PreTrainedModel) and not _holds_shards(trainer):
            load_weights(model, resume_from_checkpoint)
        else:
            parent: Any = super()
            parent._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        trainer: Any = self
        if isinstance(trainer.model, PreTrainedModel) and not _holds_shards(trainer):
            load_weights(trainer.model, trainer.state.best_model_checkpoint)
        else:
            parent: Any = super()
            parent._load_best_model()


class MDGDTrainer(MDGDTrainerMixin, Trainer):
    """The Trainer of transformers around MDGD: see :class:`MDGDTrainerMixin` for its own arguments."""


class _IsMade:
    """Ends the chain of constructors: the trainer behind it has been made."""

    def __init__(self) -> None:
        pass


def adopt(trainer: Trainer, **options: Any) -> None:
    """Put :class:`MDGDTrainerMixin` before the class of a trainer that a framework has made, before it trains.

    Args:
        trainer: any trainer of transformers, whose class becomes one of its own.
        **options: the mixin's own arguments.

    Raises:
        TypeError: the mixin is there already, or the model is not one of transformers and there is no ``tap``.
        ValueError: settings of the trainer that the passes do not support, naming them.
    """
    kind = type(trainer)
    if isinstance(trainer, MDGDTrainerMixin):
        raise TypeError(f"adopt: {kind.__name__} has the mixin already")
    trainer.__class__ = type(f"MDGD{kind.__name__}", (MDGDTrainerMixin, _IsMade, kind), {})
    try:
        MDGDTrainerMixin.__init__(trainer, **options)  # type: ignore[arg-type]
    except BaseException:
        trainer.__class__ = kind
        raise


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
        super().__init__(tap.text_module, tap.mask, tap.layers)
        self.tap = tap
        self.z: Tensor | None = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        with self.tap.aside():
            yield

    def __call__(self, model: Any, batch: Batch) -> tuple[Any, Tensor]:
        output, z = self.tap(model, batch)
        self.z = z.detach()
        return output, z

    def features(self, model: Any, batch: Batch, *, whole: bool = False) -> Tensor:
        return self.tap.features(model, batch, whole=whole)


def _inside(optimizer: Any) -> MDGDOptimizer | None:
    """The MDGDOptimizer inside what accelerate has put around it, if there is one."""
    while not isinstance(optimizer, MDGDOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, MDGDOptimizer) else None


@contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """The owner has these attributes here."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(owner)[name]
        vars(owner).update(before)


def _holds_shards(trainer: Any) -> bool:
    """Whether whole weights are not in the model, and have a way of their own into it."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _fsdp_plugin(trainer: Any) -> Any:
    return getattr(trainer.accelerator.state, "fsdp_plugin", None)


def _watching(tap: VisualTap | None, model: nn.Module) -> _Watching:
    return _Watching(tap or VisualTap.for_model(model))


def _refuse_unsupported(trainer: Any) -> None:
    args = trainer.args
    # Older releases of transformers have the second name alone.
    kind = "activation" if hasattr(args, "activation_checkpointing") else "gradient"
    checkpointing = getattr(args, f"{kind}_checkpointing") and getattr(args, f"{kind}_checkpointing_kwargs")
    found = {
        "a mask with DeepSpeed, whose step is in partitions of flat copies (use fully_shard, fsdp_version 2)": (
            trainer.is_deepspeed_enabled and bool(trainer.mdgd_mask or trainer.mdgd_compact)
        ),
        "offload with DeepSpeed, whose reference is in parts": trainer.is_deepspeed_enabled and trainer.mdgd_offload,
        "DataParallel (several GPUs in one process; use one, or torchrun)": args.n_gpu > 1,
        "FSDP1, which mixes parameters in flat shards (set version 2 in fsdp_config)": (
            trainer.is_fsdp_enabled and getattr(_fsdp_plugin(trainer), "fsdp_version", 1) != 2
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

"""ms-swift 4: ``swift sft --external_plugins plugin.py --optimizer mdgd``, where plugin.py calls :func:`register`.

Or ``--loss_type mdgd``, after :func:`register_loss`, beside an optimizer of ms-swift's own.
"""

from typing import Any, Literal

from peft import PeftModel
from swift.callbacks import TrainerCallback, callbacks_map
from swift.loss import loss_map
from swift.loss.causal_lm import CustomCrossEntropyLoss
from swift.optimizers import OptimizerCallback, optimizers_map
from torch import Tensor

from torch_mdgd.integrations.transformers import MDGDTrainerMixin, adopt
from torch_mdgd.integrations.written import ADVISED
from torch_mdgd.loss import VisualLoss


def register(name: str = "mdgd", **options: Any) -> None:
    """Let ``--optimizer NAME`` train with MDGD, whatever ``--optim`` and ``--tuner_type`` are.

    Args:
        name: that of the optimizer on the command line.
        **options: the arguments of :class:`~torch_mdgd.integrations.transformers.MDGDTrainerMixin`; ``rule`` is
            ``"MDGD(3.0, regularize=0)"`` if it is left out.
    """
    settings = {"rule": ADVISED, **options}

    class Passes(TrainerCallback):  # type: ignore[misc]
        """Puts the passes into the trainer as soon as it is made, so that it loads checkpoints, too."""

        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            adopt(self.trainer, **settings)

    class Switch(OptimizerCallback):  # type: ignore[misc]
        """Makes the optimizer that ms-swift makes by default, which the trainer then wraps."""

        def __init__(self, args: Any, trainer: Any) -> None:
            super().__init__(args, trainer)
            _call_back(args, name)
            if args.gradient_checkpointing and not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
                # On one device ms-swift takes the other kind unless it is told, and that drops gradients.
                args.gradient_checkpointing_kwargs = {"use_reentrant": False}

    callbacks_map[name], optimizers_map[name] = Passes, Switch


def register_loss(name: str = "mdgd", *, align: float = 3.0, alignment: Literal["l1", "mse"] = "l1") -> None:
    """Let ``--loss_type NAME`` train on L + αL_v, beside any optimizer of ms-swift's, such as ``--optimizer muon``.

    It is d = g + αv of ``MDGD(align, regularize=0)``, in one backward pass. L is ms-swift's ``cross_entropy``. φ is the
    model as it is when the trainer has been made, and is in no checkpoint. In several processes L_v is of each one's
    own image tokens. ``visual_loss`` is logged.

    Args:
        name: that of the loss on the command line.
        align: α.
        alignment: the form of L_v (5).
    """
    callback = f"{name}_loss"

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Takes φ, before a checkpoint is loaded into the model."""

        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            _refuse_loss(self.trainer, name)
            self.trainer.compute_loss_func.visual = VisualLoss(self.trainer.model, alignment=alignment)

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if isinstance(self.trainer, MDGDTrainerMixin):
                raise ValueError(f"--loss_type {name} beside MDGD's own --optimizer counts αv twice: take one")

    class Loss(CustomCrossEntropyLoss):  # type: ignore[misc]
        """L + αL_v, of which ms-swift divides the first by the tokens of all micro-batches."""

        visual: VisualLoss

        def __init__(self, args: Any, trainer: Any) -> None:
            super().__init__(args, trainer)
            _call_back(args, callback)

        def __call__(self, outputs: Any, labels: Tensor, *, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
            loss: Tensor = super().__call__(outputs, labels, num_items_in_batch=num_items_in_batch, **kwargs)
            trainer = self.trainer
            if not trainer.model.training:
                return loss
            visual = self.visual.take()
            trainer.custom_metrics["train"]["visual_loss"].update(visual.detach())
            shares = trainer.current_gradient_accumulation_steps
            if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
                # ms-swift multiplies by it, since it has divided L by the tokens of all processes.
                shares *= trainer.accelerator.num_processes
            both: Tensor = loss + align / shares * visual
            return both

    callbacks_map[callback], loss_map[name] = Watch, Loss


def _call_back(args: Any, name: str) -> None:
    """Let the trainer that is being made have this callback."""
    args.callbacks = [*(x for x in args.callbacks if x != name), name]


def _refuse_loss(trainer: Any, name: str) -> None:
    instead = "use --optimizer mdgd, whose checkpoints hold φ"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(f"--loss_type {name}: with DeepSpeed or FSDP parameters are divided, and so is φ: {instead}")
    args = trainer.args
    if args.resume_from_checkpoint and (isinstance(trainer.model, PeftModel) or args.resume_only_model):
        raise ValueError(
            f"--loss_type {name}: resume_from_checkpoint, of adapters or with resume_only_model, has already brought "
            f"weights that have moved from φ, which is in no checkpoint: {instead}"
        )

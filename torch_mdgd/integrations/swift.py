"""ms-swift 4: ``swift sft --external_plugins plugin.py --optimizer mdgd``, where plugin.py calls :func:`register`."""

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

from torch_mdgd.integrations.transformers import MDGDTrainerMixin, adopt
from torch_mdgd.integrations.written import ADVISED


def register(name: str = "mdgd", **options: Any) -> None:
    """Let ``--optimizer NAME`` train with MDGD, whatever ``--optim`` and ``--tuner_type`` are.

    Args:
        name: that of the optimizer on the command line.
        **options: the arguments of :class:`~torch_mdgd.integrations.transformers.MDGDTrainerMixin`; ``rule`` is
            ``"MDGD(3.0, regularize=0)"`` if it is left out.
    """

    class MDGDCallback(_Callback):
        settings = {"rule": ADVISED, **options}

    optimizers_map[name] = MDGDCallback


class _Callback(OptimizerCallback):  # type: ignore[misc]
    """Makes the optimizer that ms-swift would make, and the trainer one that takes the passes."""

    settings: dict[str, Any] = {}

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        if args.gradient_checkpointing and not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            # ms-swift takes the other kind on one device unless it is told, and that drops gradients.
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}

    def create_optimizer(self, model: Any = None) -> Any:
        """The trainer's, which asks here again for the one to wrap."""
        if isinstance(self.trainer, MDGDTrainerMixin):
            return super().create_optimizer(model)
        adopt(self.trainer, **self.settings)
        return self.trainer.create_optimizer(model)

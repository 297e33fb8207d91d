"""ms-swift 4: ``swift sft --external_plugins plugin.py --optimizer mdgd``, where plugin.py calls :func:`register`."""

from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map
from swift.optimizers import OptimizerCallback, optimizers_map

from torch_mdgd.integrations.transformers import adopt
from torch_mdgd.integrations.written import ADVISED


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
            args.callbacks = [*(x for x in args.callbacks if x != name), name]
            if args.gradient_checkpointing and not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
                # On one device ms-swift takes the other kind unless it is told, and that drops gradients.
                args.gradient_checkpointing_kwargs = {"use_reentrant": False}

    callbacks_map[name], optimizers_map[name] = Passes, Switch

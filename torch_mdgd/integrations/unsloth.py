"""Unsloth: ``MDGDUnslothTrainer(rule="MDGD(3.0, regularize=0)", ...)`` in place of its ``UnslothTrainer``."""

from unsloth import UnslothTrainer

from torch_mdgd.integrations.transformers import MDGDTrainerMixin


class MDGDUnslothTrainer(MDGDTrainerMixin, UnslothTrainer):  # type: ignore[misc]
    """Unsloth's trainer with the passes of MDGD: see :class:`MDGDTrainerMixin` for its own arguments.

    Load the model with ``use_gradient_checkpointing=True`` or ``False``: Unsloth's own kind, ``"unsloth"``, needs a GPU
    and was not tried. Without a GPU Unsloth takes no pictures.
    """

"""Axolotl: ``plugins: [torch_mdgd.integrations.axolotl.MDGDPlugin]``, and ``mdgd_rule:`` and ``mdgd_mask:``."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from torch_mdgd.integrations.transformers import adopt
from torch_mdgd.integrations.written import ADVISED, written_mask, written_rule


class MDGDArgs(BaseModel):
    """The plugin's keys in Axolotl's file.

    Attributes:
        mdgd_rule: such as ``Anchor(strength=5.0)``.
        mdgd_mask: such as ``Random(0.1)``; every element moves without it.
    """

    mdgd_rule: str = ADVISED
    mdgd_mask: str | None = None


class MDGDPlugin(BasePlugin):  # type: ignore[misc]
    """Whatever trainer Axolotl makes takes the passes of MDGD."""

    def get_input_args(self) -> str:
        """Where the plugin's keys are declared."""
        return f"{MDGDArgs.__module__}.{MDGDArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Refuse what the passes cannot hold, before anything is loaded.

        Raises:
            ValueError: ``mdgd_rule`` or ``mdgd_mask`` is not as written in Python; reentrant checkpointing.
        """
        written_rule(cfg.get("mdgd_rule") or ADVISED)
        if cfg.get("mdgd_mask"):
            written_mask(cfg["mdgd_mask"])
        if cfg.get("gradient_checkpointing"):
            options = cfg.get("gradient_checkpointing_kwargs") or {}
            if options.get("use_reentrant"):
                raise ValueError(
                    "gradient_checkpointing_kwargs: use_reentrant: true drops gradients of MDGD: use false"
                )
            cfg["gradient_checkpointing_kwargs"] = {**options, "use_reentrant": False}

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Put the passes into the trainer."""
        adopt(trainer, rule=cfg.mdgd_rule or ADVISED, mask=cfg.mdgd_mask or None)

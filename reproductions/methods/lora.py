"""The paper's LoRA: adapters on the queries and keys of the language model, and the whole connector."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from reproductions.methods import base
from reproductions.shared.fields import limited
from torch_mdgd import connector
from torch_mdgd.models.parts import text_decoder

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

TARGETS = ("q_proj", "k_proj")


def lora_config(
    model: nn.Module, rank: int = 16, alpha: float | None = None, targets: Sequence[str] = TARGETS
) -> "LoraConfig":
    """Adapters of this rank on q and k of every layer of the language model; the connector is trained in full.

    Rank 16 gives both of the paper's counts of trained numbers, and no other power of two does. A bare ``q_proj`` would
    match the vision tower too, so layers are named by the language model's own path.

    Args:
        model: a vision-language model of transformers.
        rank: r.
        alpha: scale of the adapters, times r; 2 r by default.
        targets: last names of the layers.

    Raises:
        ValueError: ``rank`` is less than 1, or there is no connector.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"lora: rank must be at least 1, got {rank}")
    names = {id(module): name for name, module in model.named_modules()}
    language, whole = names[id(text_decoder(model))], connector(model)
    # Several connectors, as those of Qwen3-VL, are trained all.
    parts = [part for part in whole.modules() if id(part) in names and not isinstance(part, nn.ModuleList)]
    parts = [part for part in parts if not any(part is not other and part in set(other.modules()) for other in parts)]
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=rf"{re.escape(language)}\..*\.({'|'.join(targets)})",
        modules_to_save=[names[id(part)] for part in parts],
    )


def lora(
    model: "PreTrainedModel", rank: int = 16, alpha: float | None = None, targets: Sequence[str] = TARGETS
) -> "PeftModel":
    """The model with these adapters, and nothing else to train; ``merge_and_unload()`` gives it back without them.

    The model is changed in place. It computes the same as before until a step is taken.
    """
    from peft import PeftModel, get_peft_model

    adapted = get_peft_model(model, lora_config(model, rank, alpha, targets))
    assert isinstance(adapted, PeftModel)
    return adapted


@dataclass(frozen=True)
class LoraSettings(base.Settings):
    """Settings of LoRA.

    Attributes:
        rank: r; 16 gives the published counts.
        alpha: scale of the adapters, times r; 0 for 2 r.
    """

    rank: int = limited(16, least=1)
    alpha: float = limited(0.0, least=0)


class LoRA(base.Method):
    """The paper's LoRA baseline."""

    name = "lora"
    title = "LoRA"
    Settings: ClassVar[type] = LoraSettings

    def targets(self, decoder: nn.Module) -> tuple[str, ...]:
        """Last names of the layers that get adapters."""
        return TARGETS

    def mark(self, network: Any, layers: int) -> nn.Module:
        """Put the adapters in; ``layers`` does not matter, all are adapted."""
        fixed = base.fixed_names(network)
        targets = self.targets(text_decoder(network))
        module = lora(network, self.settings.rank, self.settings.alpha or None, targets)
        base.keep_fixed(module, fixed)
        return module

    def finish(self, work: base.Work, module: nn.Module) -> None:
        """Add the adapters to the weights that they stand beside."""
        merge(module)


def merge(module: Any) -> None:
    """Take peft's layers out again; the network that they were put in is then as it was, with new numbers."""
    module.merge_and_unload()

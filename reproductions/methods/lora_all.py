"""LoRA on all linear layers of the language model, as most fine-tuning has it; alone, with αv and with the anchor."""

from dataclasses import dataclass

from torch import nn

from reproductions.methods import anchor, fine_tune_lv
from reproductions.methods.lora import LoRA, LoraSettings


class LoRAAll(LoRA):
    """And the whole connector, as the paper's LoRA."""

    name = "lora-all"
    title = "LoRA, all layers"
    in_paper = False

    def targets(self, decoder: nn.Module) -> tuple[str, ...]:
        """The names of all linear layers of the decoder's layers."""
        named = {name.rpartition(".")[2] for name, part in decoder.named_modules() if isinstance(part, nn.Linear)}
        return tuple(sorted(named))


@dataclass(frozen=True)
class AlignedSettings(LoraSettings, fine_tune_lv.AlignSettings):
    """Settings of both."""


class LoRAAllLv(LoRAAll, fine_tune_lv.FineTuneLv):
    """φ are the adapters as they begin."""

    name = "lora-all-lv"
    title = "LoRA, all layers + αv"
    Settings = AlignedSettings


@dataclass(frozen=True)
class AnchoredSettings(LoraSettings, anchor.AnchorSettings):
    """Settings of both."""


class LoRAAllAnchor(LoRAAll, anchor.Anchored):
    """W − W₀ = s BA."""

    name = "lora-all-anchor"
    title = "LoRA, all layers + anchor"
    Settings = AnchoredSettings

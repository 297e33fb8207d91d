"""LoRA on queries and keys of the language model, with the whole connector."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from reproductions.methods.lora import lora
from reproductions.paper.fields import limited
from reproductions.paper.methods import base


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
    Settings = LoraSettings

    def mark(self, network: Any, layers: int) -> nn.Module:
        """Put the adapters in; ``layers`` does not matter, all are adapted."""
        fixed = base.fixed_names(network)
        module = lora(network, self.settings.rank, self.settings.alpha or None)
        base.keep_fixed(module, fixed)
        return module

    def prepare(self, work: base.Work) -> nn.Module:
        """The network with its adapters."""
        return self.mark(work.network, work.layers)

    def finish(self, work: base.Work, module: nn.Module) -> None:
        """Add the adapters to the weights that they stand beside."""
        merge(module)


def merge(module: Any) -> None:
    """Take peft's layers out again; the network that they were put in is then as it was, with new numbers."""
    module.merge_and_unload()

"""OSF of peft (Nayak et al. 2025, arXiv 2504.07097): the largest singular directions of each weight stay fixed."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from reproductions.methods import base
from reproductions.methods.lora import merge
from reproductions.shared.fields import limited
from torch_mdgd import connector, last_decoder_layers


@dataclass(frozen=True)
class OSFSettings(base.Settings):
    """Settings of OSF.

    Attributes:
        kept: share of each weight's singular directions, the largest, that stays fixed.
    """

    kept: float = limited(0.5, least=0.01, most=0.99)


class OSF(base.Method):
    """The Linear layers of the last decoder layers, and the whole connector."""

    name = "osf"
    title = "OSF"
    in_paper = False
    rewrites = True
    Settings = OSFSettings

    def mark(self, network: Any, layers: int) -> nn.Module:
        """The network with its weights taken apart; takes a singular value decomposition of each."""
        from peft import OSFConfig, get_peft_model

        names = {id(part): name for name, part in network.named_modules()}
        fixed, whole = base.fixed_names(network), connector(network)
        targets = [
            f"{names[id(layer)]}.{name}"
            for layer in last_decoder_layers(network, layers)
            for name, part in layer.named_modules()
            if isinstance(part, nn.Linear)
        ]
        config = OSFConfig(target_modules=targets, effective_rank=self.settings.kept)
        module: nn.Module = get_peft_model(network, config)
        whole.requires_grad_(True)
        base.keep_fixed(module, fixed)
        return module

    def prepare(self, work: base.Work) -> nn.Module:
        """The network with its weights taken apart, in float32: peft multiplies gradients with the parts."""
        for layer in last_decoder_layers(work.network, work.layers):
            layer.float()
        return self.mark(work.network, work.layers)

    def finish(self, work: base.Work, module: nn.Module) -> None:
        """Put the weights together."""
        merge(module)

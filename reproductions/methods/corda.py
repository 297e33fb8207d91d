"""CorDA of peft (Yang et al. 2024, arXiv 2406.05223): LoRA that begins where old knowledge is not.

In its knowledge-preserved mode the adapters begin as the directions of each weight that old inputs use least.
"""

from dataclasses import dataclass

from torch import nn

from reproductions.methods import base
from reproductions.methods.lora import LoRA, LoraSettings, lora_config
from reproductions.shared.fields import limited


@dataclass(frozen=True)
class CordaSettings(LoraSettings):
    """Settings of CorDA.

    Attributes:
        samples: of what was learned before, for the covariance of inputs.
    """

    samples: int = limited(256, least=1)


class CorDA(LoRA):
    """Of the shape of LoRA."""

    name = "corda"
    title = "CorDA"
    in_paper = False
    remembers = rewrites = True
    Settings = CordaSettings

    def prepare(self, work: base.Work) -> nn.Module:
        """The network with adapters made from samples of the pre-trained tasks."""
        from peft import get_peft_model
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        network, s = work.network, self.settings
        fixed = base.fixed_names(network)
        config = lora_config(network, s.rank, s.alpha or None)
        config.init_lora_weights, config.corda_config = "corda", CordaConfig(corda_method="kpm")

        def run() -> None:
            for batch in work.memory_batches(s.samples):
                network(**batch)

        preprocess_corda(network, config, run)
        module = get_peft_model(network, config)
        base.keep_fixed(module, fixed)
        return module

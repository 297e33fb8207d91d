"""Gate and up alone: two of the three projections of the last decoder layers' MLPs (arXiv 2510.08564)."""

from torch import nn

from reproductions.methods import base
from torch_mdgd import freeze_all_but, last_decoder_layers

NAMES = ("gate_proj", "up_proj")


class GateUp(base.Method):
    """Of as many layers as the other methods train; down, attention and connector stay."""

    name = "gate-up"
    title = "Gate and up alone"
    in_paper = False

    def mark(self, network: nn.Module, layers: int) -> nn.Module:
        """Train what is called so in these layers.

        Raises:
            ValueError: nothing is.
        """
        fixed = base.fixed_names(network)
        named = [pair for layer in last_decoder_layers(network, layers) for pair in layer.named_modules()]
        found = [part for name, part in named if name.rpartition(".")[2] in NAMES]
        if not found:
            raise ValueError(f"gate-up: the last decoder layers have no {' and no '.join(NAMES)}")
        freeze_all_but(network, found)
        base.keep_fixed(network, fixed)
        return network

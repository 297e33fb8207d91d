"""Self-attention alone: the projections of the last decoder layers' attention, and nothing else (arXiv 2510.08564)."""

from torch import nn

from reproductions.methods import base
from torch_mdgd import freeze_all_but, last_decoder_layers


class Attention(base.Method):
    """Of as many layers as the other methods train; without the connector."""

    name = "attention"
    title = "Self-attention alone"
    in_paper = False

    def mark(self, network: nn.Module, layers: int) -> nn.Module:
        """Train what is called attention in these layers."""
        fixed = base.fixed_names(network)
        freeze_all_but(network, [attention_of(layer) for layer in last_decoder_layers(network, layers)])
        base.keep_fixed(network, fixed)
        return network


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention of a decoder layer.

    Raises:
        ValueError: none of its parts is called so.
    """
    for name, part in layer.named_children():
        if ("attn" in name or "attention" in name) and "norm" not in name:
            return part
    raise ValueError(f"attention: {type(layer).__name__} has no part that is called attention")

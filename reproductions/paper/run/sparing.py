"""What spares a card's memory in a row: states of 8 bits, frozen layers in 4 bits, the reference on the host.

Frozen layers are in 4 bits while a row trains, and then alone: what was trained is put into the published weights in 16
bits, which are what is measured, kept and exported.
"""

import gc
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from reproductions.methods import Method
from reproductions.methods.base import trained_parameters
from reproductions.paper.config import Experiment
from reproductions.paper.run import ranks
from reproductions.paper.run.work import Workshop, remembered
from reproductions.shared.fields import ConfigError
from torch_mdgd import connector
from torch_mdgd.models.parts import head_modules, text_decoder
from torch_mdgd.parallel.dtensor import whole

PARTS = ("vision", "decoder", "all")
"""Of which frozen layers may be in 4 bits."""
OPTIMIZERS = {"adamw8bit": "adamw_bnb_8bit"}
"""What transformers calls them; its default is AdamW in full."""
STATE = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}
"""Bytes of the two moments of a number; those of 8 bits share a scale of four bytes among 256."""
FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a number in NF4: scales of 64 numbers are bytes, of which 256 share one of four."""


def require_possible(experiment: Experiment, method: Method) -> None:
    """Refuse what a row cannot do as it was asked, before anything is loaded.

    Raises:
        ConfigError: naming the setting and why.
    """
    t = experiment.training
    where = f"{experiment.name} {method.name}"
    if not trains(method):
        return
    if t.accumulation % ranks.world():
        raise ConfigError(
            f"{where}: {ranks.world()} processes share the passes of a step, and training.accumulation is "
            f"{t.accumulation}: take a divisor of it, or another batch and accumulation of the same product"
        )
    why = why_not(experiment, method)
    if why is not None:
        raise ConfigError(f"{where}: {why}")
    if t.shard and ranks.world() == 1:
        raise ConfigError(
            f"{where}: training.shard splits a row over the processes of torchrun, and this is the only one"
        )
    for key, asked in (("optimizer", t.optimizer == "adamw8bit"), ("quantize", t.quantize != "none")):
        if asked and find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"{where}: training.{key}: bitsandbytes is not installed: pip install 'torch-mdgd[lowbit]'"
            )


def trains(method: Method) -> bool:
    """Whether a method itself takes steps: not what is measured as it is, nor what begins with another's result."""
    return method.trains and method.begins_with is None


def why_not(experiment: Experiment, method: Method) -> str | None:
    """Which setting a method does not go with, and why; None where it goes with all."""
    t = experiment.training
    if method.remembers and not remembered(experiment):
        return f"pretrained: none of {', '.join(experiment.pretrained)} has a training split to remember examples of"
    if t.optimizer == "adamw8bit" and method.compact:
        return (
            "training.optimizer=adamw8bit scales states of 256 numbers together, and a compact state is of single "
            f"numbers: add --set methods.{method.name}.compact=false"
        )
    if t.quantize != "none" and method.rewrites:
        return f"training.quantize={t.quantize}: {method.title} makes its adapters from the weights in full"
    if t.shard and (t.optimizer != "adamw" or t.quantize != "none" or t.reference != "device"):
        return (
            "training.shard goes with no other setting that spares memory: states, 4 bits and references are of copies"
        )
    if t.shard and (method.keeps or method.rewrites or method.compact):
        own = f"add --set methods.{method.name}.compact=false" if method.compact else "its tensors are of whole weights"
        return f"training.shard splits weights, and {method.title} does not know of it: {own}"
    if t.reference == "cpu" and method.keeps:
        return f"training.reference=cpu is of rules, and {method.title} holds a reference of its own on the card"
    return None


def linear_layers(network: nn.Module, part: str) -> list[nn.Linear]:
    """The plain Linear layers of a part, frozen or not, without connectors and the head.

    Args:
        network: as it was loaded, or its skeleton.
        part: "vision" for what is outside of the text decoder, "decoder", "all", or "none".
    """
    decoder, left_out = set(text_decoder(network).modules()), {*connector(network).modules(), *head_modules(network)}
    # Not subclasses, such as the projection of torch's attention, whose weight is read past the layer.
    linears = [layer for layer in network.modules() if type(layer) is nn.Linear and layer not in left_out]
    wanted = {"none": (), "vision": (False,), "decoder": (True,), "all": (False, True)}[part]
    return [layer for layer in linears if (layer in decoder) in wanted]


def frozen(layers: Sequence[nn.Linear]) -> list[nn.Linear]:
    """Those of which nothing is trained."""
    return [layer for layer in layers if not any(p.requires_grad for p in layer.parameters())]


def prepare(work: Workshop, method: Method) -> nn.Module:
    """The method's own preparation, and then frozen layers in 4 bits, as they are set; the module to call."""
    layers = linear_layers(work.network, work.experiment.training.quantize)
    module = method.prepare(work)
    _quantize(module, frozen(layers), getattr(torch, work.experiment.dtype))
    return module


def trained_values(module: nn.Module) -> list[Tensor]:
    """What was trained, whole, on the CPU; all processes call it."""
    return [whole(p.detach()).cpu() for p in trained_parameters(module)]


def in_full(work: Workshop, method: Method, values: Sequence[Tensor]) -> nn.Module:
    """The method's module around the published weights, which the workshop reads anew, with what was trained.

    What it was trained in has layers in 4 bits, or parts of layers.
    """
    del work.model
    gc.collect()
    module = method.prepare(work)
    for p, x in zip(trained_parameters(module), values, strict=True):
        p.data = x.to(p.device)
    return module


def _quantize(module: nn.Module, layers: Sequence[nn.Linear], dtype: torch.dtype) -> None:
    left = set(layers)
    for parent in list(module.modules()) if left else ():
        for name, child in list(parent.named_children()):
            if child in left:
                setattr(parent, name, _in_four_bits(child, dtype))


def _in_four_bits(layer: Any, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    out = Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    # On some CPUs it would order weights anew for its own kernels, which take widths of 32 alone.
    out.support_avx512bf16_for_cpu = False
    weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=out)
    out.weight, out.bias = weight.to(layer.weight.device), layer.bias
    return out.train(layer.training)

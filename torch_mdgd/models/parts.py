"""The parts of a vision-language model that fine-tuning names: its text decoder, last layers and connector."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from torch_mdgd.models.families import CONNECTORS


def last_decoder_layers(model: nn.Module, n: int) -> list[nn.Module]:
    """The last n layers of the model's text decoder, in order.

    Args:
        model: a model of transformers, also inside DistributedDataParallel, torch.compile or a PeftModel.
        n: how many, at least 1.

    Raises:
        TypeError: not a model of transformers.
        ValueError: the decoder has no list of layers, or fewer than n.
    """
    layers = decoder_layers(text_decoder(model))
    if not 1 <= n <= len(layers):
        raise ValueError(f"last_decoder_layers: n must be between 1 and the decoder's {len(layers)} layers, got {n}")
    return list(layers)[-n:]


def connector(model: nn.Module) -> nn.Module:
    """What maps the vision tower's features into the text decoder: found by name, see ``models.families``.

    Args:
        model: a vision-language model, as it is or in DistributedDataParallel.

    Returns:
        the module; for several, as in Qwen3-VL, a ``ModuleList`` of them. A parameter beside it, such as the
        ``image_newline`` of LLaVA-NeXT, is not part of it.

    Raises:
        ValueError: no module has such a name.
    """
    inner = unwrap(model)
    found = [part for name, part in inner.named_modules() if name.rpartition(".")[2] in CONNECTORS]
    if not found:
        raise ValueError(
            f"connector: no module of {type(inner).__name__} is called {' or '.join(CONNECTORS)}; its parts are "
            + ", ".join(name for name, _ in inner.named_modules() if name and name.count(".") < 2)
        )
    return found[0] if len(found) == 1 else nn.ModuleList(found)


def freeze_all_but(model: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Let only these modules be trained: sets ``requires_grad`` of every parameter of the model.

    Args:
        model: any module.
        modules: parts of it, such as ``[*last_decoder_layers(model, 6), connector(model)]``.

    Returns:
        the trainable parameters, each once, in the model's order: what the optimizer gets.

    Raises:
        ValueError: a module that is no part of the model, or no parameters in any; nothing was changed.
    """
    own, kept = set(model.parameters()), set[nn.Parameter]()
    for module in modules:
        parameters = set(module.parameters())
        if not parameters <= own:
            raise ValueError(f"freeze_all_but: a {type(module).__name__} has parameters that the model does not hold")
        kept |= parameters
    if not kept:
        raise ValueError("freeze_all_but: modules hold no parameters, so nothing would be trained")
    for parameter in own:
        parameter.requires_grad_(parameter in kept)
    return [parameter for parameter in model.parameters() if parameter in kept]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile and a PeftModel."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            unwrapped: nn.Module = inner
            return unwrapped


def text_decoder(model: nn.Module) -> nn.Module:
    """The module of a model of transformers that returns the last hidden states of its text, after the final norm.

    Raises:
        TypeError: not a model of transformers.
    """
    inner: Any = unwrap(model)
    if not (hasattr(inner, "config") and hasattr(inner, "get_decoder")):
        raise TypeError(
            f"{type(inner).__name__} is not a model of transformers: it has no config and get_decoder(). Name the "
            "modules yourself, as in VisualTap(text_module, mask)"
        )
    # A decoder may come with a head around it, whose output is logits.
    while (decoder := inner.get_decoder()) is not inner:
        inner = decoder
    found: nn.Module = inner
    return found


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The list of a text decoder's layers.

    Raises:
        ValueError: it has no ``layers``.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"the text decoder {type(decoder).__name__} has no ModuleList called 'layers'")
    return layers


def has_to_finish(model: nn.Module) -> bool:
    """Whether a pass that ends at an inner module would leave outer ones in the middle of theirs.

    So it is with modules sharded by ``fully_shard``, offloaded by accelerate, or compiled.
    """
    return any(hasattr(m, name) for m in model.modules() for name in ("unshard", "_hf_hook", "_orig_mod"))

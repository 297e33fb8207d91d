"""The parts of a vision-language model that fine-tuning names: its text decoder, last layers and connector."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from torch_mdgd.models.families import CONNECTORS, NO_PICTURES, PICTURES, TOWERS


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
    """What maps the vision tower's features into the text decoder.

    That is what stands beside the text decoder and is no vision tower, embedding table, head, nor for sound or for
    making pictures; and what has a name of ``models.families.CONNECTORS``, such as a merger inside the tower.

    Args:
        model: a vision-language model, as it is or in DistributedDataParallel.

    Returns:
        the module; for several, as in Qwen3-VL, a ``ModuleList`` of them. A parameter beside it, such as the
        ``image_newline`` of LLaVA-NeXT, is not part of it.

    Raises:
        ValueError: there is none.
    """
    inner = unwrap(model)
    found = _beside_the_decoder(inner) or _named(inner)
    if not found:
        raise ValueError(
            f"connector: no module of {type(inner).__name__} is called {' or '.join(CONNECTORS)}, and nothing stands "
            "beside its text decoder; its parts are "
            + ", ".join(name for name, _ in inner.named_modules() if name and name.count(".") < 2)
        )
    return found[0] if len(found) == 1 else nn.ModuleList(found)


def _beside_the_decoder(inner: nn.Module) -> list[nn.Module]:
    """The connectors in the smallest part that holds the decoder and something else besides."""
    try:
        decoder = text_decoder(inner)
    except (TypeError, ValueError):
        return []
    if getattr(inner.config, "is_encoder_decoder", False):
        return []
    embeddings: Any = getattr(decoder, "get_input_embeddings", lambda: None)
    table = embeddings()
    owners = [module for module in inner.modules() if module is not decoder and decoder in set(module.modules())]
    for owner in reversed(owners):
        passed_over = {id(x) for x in (decoder, table, head_of(owner)) if x is not None}
        others = [
            (name, module)
            for name, module in owner.named_children()
            if _holds(module) and not any(id(part) in passed_over for part in module.modules())
        ]
        if others:
            return [m for n, m in others if not any(word in n for word in NO_PICTURES) and not _holds_tower(n, m)]
    return []


def _named(inner: nn.Module) -> list[nn.Module]:
    """The modules with a connector's name, none inside another."""
    found: dict[str, nn.Module] = {}
    for name, module in inner.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if name.rpartition(".")[2] in CONNECTORS and _holds(module) and not inside:
            found[name] = module
    return list(found.values())


def _holds_tower(name: str, module: nn.Module) -> bool:
    return any(is_tower(f"{name}.{inner}".rstrip("."), part) for inner, part in module.named_modules())


def is_tower(name: str, module: nn.Module) -> bool:
    """Whether a module looks at pictures: by its last name, or by what it says of its input."""
    named = name.rpartition(".")[2] in TOWERS
    return named or (hasattr(module, "config") and getattr(module, "main_input_name", None) in PICTURES)


def head_of(module: Any) -> nn.Module | None:
    """The output embedding of a module of transformers, which makes logits of hidden states; None without one."""
    if not hasattr(module, "get_output_embeddings"):
        return None
    try:
        head = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def token_modules(decoder: nn.Module) -> set[nn.Module]:
    """The modules of a text decoder that are run on its sequence, without what looks at pictures inside of it."""
    others = [part for name, part in decoder.named_children() if _holds_tower(name, part)]
    if others:
        others += _named(decoder)
    return set(decoder.modules()) - {module for part in others for module in part.modules()}


def head_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of a model's output embeddings, which make logits of hidden states."""
    heads = [head for module in model.modules() if (head := head_of(module)) is not None]
    return {module for head in heads for module in head.modules()}


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


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
    """The model inside DistributedDataParallel, DeepSpeed's engine, torch.compile and a PeftModel."""
    inner: Any = model
    while True:
        engine = type(inner).__module__.startswith("deepspeed.runtime.")
        if engine or isinstance(inner, nn.parallel.DistributedDataParallel):
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

    ``get_decoder()`` is followed to its end, and a decoder that comes with a head around it, whose output would be
    logits, is opened: its largest child that is no head.

    Raises:
        TypeError: not a model of transformers.
        ValueError: nothing but a head is inside.
    """
    inner: Any = unwrap(model)
    if not (hasattr(inner, "config") and hasattr(inner, "get_decoder")):
        raise TypeError(
            f"{type(inner).__name__} is not a model of transformers: it has no config and get_decoder(). Name the "
            "modules yourself, as in VisualTap(text_module, mask)"
        )
    found: Any = _last_decoder(inner)
    owner = _picture_model(inner)
    if owner is not None and found not in set(owner.modules()):
        found = _last_decoder(owner)
    while (head := head_of(found)) is not None:
        rest = [child for child in found.children() if child is not head and not isinstance(child, nn.Embedding)]
        largest = max(rest, key=lambda child: sum(p.numel() for p in child.parameters()), default=head)
        if largest is head or isinstance(largest, nn.ModuleList):
            raise ValueError(
                f"the text decoder {type(found).__name__} has a head, so its output is logits, and no part without "
                "one; name the modules yourself, as in VisualTap(text_module, mask)"
            )
        found = _last_decoder(largest)
    decoder: nn.Module = found
    return decoder


def _picture_model(model: nn.Module) -> nn.Module | None:
    """The smallest part of a model that is a vision-language model by itself: it owns a tower and a decoder.

    A model may have another decoder beside it, which no picture enters: for actions, or for what is generated at once.
    """
    towers = {part for name, m in model.named_modules() if is_tower(name, m) for part in m.modules()}
    owners = [
        m
        for m in model.modules()
        if m not in towers and any(child in towers for child in m.children()) and _last_decoder(m) is not m
    ]
    return owners[-1] if owners else None


def _last_decoder(module: Any) -> Any:
    while hasattr(module, "get_decoder") and (decoder := module.get_decoder()) is not module:
        module = decoder
    return module


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

    So it is with modules sharded by ``fully_shard``, partitioned by DeepSpeed, offloaded by accelerate, or compiled.
    """
    return any(hasattr(m, name) for m in model.modules() for name in ("unshard", "ds_id", "_hf_hook", "_orig_mod"))

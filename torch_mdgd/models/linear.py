"""The linear layers that an optimizer trains, plain and LoRA's, and which of their inputs stand at which tokens."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd.models.parts import text_decoder


@dataclass(eq=False)
class Linear:
    """A layer y = Wx + b, or W₀x + s·BAx with LoRA's A and B, of which something is trained.

    Attributes:
        name: of its module in the model.
        module: whose input is x.
        in_text: whether x has a row for each token of the text decoder's sequence.
        weight: where W stands among the optimizer's parameters; None if it is not trained.
        bias: where b stands.
        lora: where A and B stand; None for a plain layer.
        adapter: LoRA's name.
        width: of x, with the 1 of a trained bias.
    """

    name: str
    module: nn.Module
    in_text: bool
    weight: int | None = None
    bias: int | None = None
    lora: tuple[int | None, int | None] | None = None
    adapter: str = ""
    width: int = 0

    @property
    def key(self) -> int:
        """The first of its places, under which something of the layer is held."""
        places = (self.weight, self.bias, *(self.lora or (None, None)))
        return next(i for i in places if i is not None)

    @property
    def scaling(self) -> float:
        """LoRA's s."""
        scaling: Any = self.module.scaling
        return float(scaling[self.adapter])


def trained_linear_layers(
    model: nn.Module, places: dict[Any, int], text_module: nn.Module | None = None, parts: Sequence[nn.Module] = ()
) -> list[Linear]:
    """The linear layers of a model that hold one of an optimizer's parameters, in the model's order.

    Args:
        model: also inside DistributedDataParallel, torch.compile or a PeftModel.
        places: where parameters stand in the optimizer.
        text_module: the decoder; that of a model of transformers if None.
        parts: only layers inside these; all if empty.

    Raises:
        ValueError: a LoRA layer that is not a sum W₀x + s·BAx (DoRA), naming it.
    """
    inside = set((text_decoder(model) if text_module is None else text_module).modules())
    wanted = {m for part in parts for m in part.modules()}
    found: list[Linear] = []
    for name, module in model.named_modules():
        if parts and module not in wanted:
            continue
        if isinstance(module, nn.Linear):
            weight, bias = places.get(module.weight), places.get(module.bias)
            if weight is not None or bias is not None:
                width = module.weight.shape[1] + (bias is not None)
                found.append(Linear(name, module, module in inside, weight, bias, width=width))
        elif hasattr(module, "base_layer") and isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            found += _adapters(name, module, places, module in inside)
    matrices = {i for layer in found for i in layer.lora or ()}
    return [layer for layer in found if layer.weight is None or layer.weight not in matrices]


def _adapters(name: str, module: Any, places: dict[Any, int], in_text: bool) -> Iterator[Linear]:
    for adapter, a in module.lora_A.items():
        b = module.lora_B[adapter]
        if isinstance(a, nn.Linear) and isinstance(b, nn.Linear):
            both = places.get(a.weight), places.get(b.weight)
            if both != (None, None):
                if adapter in getattr(module, "lora_magnitude_vector", {}):
                    raise ValueError(f"{name}: DoRA scales W + sBA by lengths, so its change is no sum: use plain LoRA")
                yield Linear(name, module, in_text, lora=both, adapter=adapter, width=a.weight.shape[1])


def uncovered(model: nn.Module, places: dict[Any, int], layers: Collection[Linear]) -> list[str]:
    """Names of an optimizer's parameters in a model that belong to none of these layers."""
    held = {i for layer in layers for i in (layer.weight, layer.bias, *(layer.lora or ())) if i is not None}
    return [name for name, p in model.named_parameters() if p.requires_grad and places.get(p, -1) not in {-1, *held}]


@contextmanager
def watching(layers: Sequence[Linear], see: Any) -> Iterator[None]:
    """Inside, ``see(layer, x, y)`` is called with what enters a layer, and what it makes of it.

    Not when gradient checkpointing runs it again.
    """

    def hook(layer: Linear) -> Any:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            if torch._C._current_graph_task_id() == -1:
                see(layer, args[0] if args else next(iter(kwargs.values())), y)

        return call

    handles = [layer.module.register_forward_hook(hook(layer), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows(x: Tensor, mask: Tensor, layer: Linear) -> Tensor | None:
    """Which of a layer's inputs are at marked tokens, bool of shape (batch, tokens); None for all of them.

    A layer outside the text decoder sees pictures alone, or has a sequence of its own.

    Raises:
        ValueError: a layer of the decoder sees another sequence than that of the mask.
    """
    if not layer.in_text:
        return None
    if x.shape[:-1] == mask.shape or (x.dim() == 2 and len(x) == mask.numel()):
        return mask
    raise ValueError(
        f"the mask has shape {tuple(mask.shape)}, the input of {layer.name} {tuple(x.shape)}: the model changed the "
        "sequence, so its tokens need a mask of their own"
    )


def prompt_tokens(batch: Any) -> Tensor:
    """Tokens of a batch that are read and not answered: attended, and -100 in its labels; bool, (batch, tokens).

    Raises:
        ValueError: the batch has no ``input_ids``.
    """
    if batch is None or "input_ids" not in batch:
        raise ValueError(f"prompt tokens are found in 'input_ids', and the batch has only {sorted(batch or ())}")
    mask = attended_tokens(batch)
    labels = batch.get("labels")
    return mask if labels is None else mask & (labels == -100)


def attended_tokens(batch: Any) -> Tensor:
    """Tokens of a batch that are no padding; bool, (batch, tokens)."""
    attention: Tensor | None = batch.get("attention_mask")
    if attention is None or attention.shape != batch["input_ids"].shape:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    return attention.bool()

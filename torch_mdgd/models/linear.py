"""The linear layers that an optimizer trains, plain and LoRA's, and which of their inputs stand at which tokens."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd.models.families import EXPERTS
from torch_mdgd.models.parts import head_modules, text_decoder, token_modules


@dataclass(eq=False)
class Linear:
    """A layer y = Wx + b, or W₀x + s·BAx with LoRA's A and B, of which something is trained.

    Attributes:
        name: of its module in the model.
        module: whose input is x.
        in_text: whether x has a row for each token of the text decoder's sequence.
        head: whether it makes logits, and may see a part of the sequence alone.
        after: whether the text decoder had been run when it was last run, as before a head of one's own.
        weight: where W stands among the optimizer's parameters; None if it is not trained.
        bias: where b stands.
        lora: where A and B stand; None for a plain layer.
        adapter: LoRA's name.
        width: of x, with the 1 of a trained bias.
        key: the first of its places whose parameter requires gradients, under which something of the layer is held:
            ``torch.distributed.checkpoint`` loads nothing of the others.
    """

    name: str
    module: nn.Module
    in_text: bool
    weight: int | None = None
    bias: int | None = None
    lora: tuple[int | None, int | None] | None = None
    adapter: str = ""
    width: int = 0
    head: bool = False
    after: bool = False
    key: int = 0

    @property
    def places(self) -> list[int]:
        """Where its trained parameters stand."""
        return [i for i in (self.weight, self.bias, *(self.lora or ())) if i is not None]

    def place_in(self, saved: Sequence[Tensor | None]) -> int:
        """Where something of the layer was saved: at another place than ``key`` if others were trained then."""
        return next((i for i in self.places if (x := saved[i]) is not None and x.numel()), self.key)

    @property
    def scaling(self) -> float:
        """LoRA's s."""
        scaling: Any = self.module.scaling
        return float(scaling[self.adapter])


def trained_linear_layers(
    model: nn.Module,
    places: dict[Any, int],
    text_module: nn.Module | None = None,
    parts: Sequence[nn.Module] = (),
    *,
    adapters: bool = True,
) -> list[Linear]:
    """The linear layers of a model that hold one of an optimizer's parameters, in the model's order.

    Experts that a router sends tokens to are left out: what enters them tells nothing of its place in the sequence.

    Args:
        model: also inside DistributedDataParallel, torch.compile or a PeftModel.
        places: where parameters stand in the optimizer.
        text_module: the decoder; that of a model of transformers if None.
        parts: only layers inside these; all if empty.
        adapters: take LoRA's two matrices for one layer; else each is a plain layer of its own.

    Raises:
        ValueError: a LoRA layer that is not a sum W₀x + s·BAx (DoRA), naming it.
    """
    inside = token_modules(text_decoder(model) if text_module is None else text_module)
    heads = head_modules(model)
    wanted = {m for part in parts for m in part.modules()}
    found: list[Linear] = []
    for name, module in model.named_modules():
        if (parts and module not in wanted) or is_routed(name):
            continue
        if isinstance(module, nn.Linear):
            weight, bias = places.get(module.weight), places.get(module.bias)
            if weight is not None or bias is not None:
                width = module.in_features + (bias is not None)
                found.append(Linear(name, module, module in inside, weight, bias, width=width))
        elif adapters and hasattr(module, "base_layer") and isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            found += _adapters(name, module, places, module in inside)
    live = {i for p, i in places.items() if p.requires_grad}
    for layer in found:
        layer.key = next((i for i in layer.places if i in live), layer.places[0])
        layer.head = layer.module in heads
        layer.in_text = layer.in_text or layer.head
    matrices = {i for layer in found for i in layer.lora or ()}
    return [layer for layer in found if layer.weight is None or layer.weight not in matrices]


def is_routed(name: str) -> bool:
    """Whether a module or parameter belongs to experts that a router sends tokens to."""
    return EXPERTS in name.split(".")


def _adapters(name: str, module: Any, places: dict[Any, int], in_text: bool) -> Iterator[Linear]:
    for adapter, a in module.lora_A.items():
        b = module.lora_B[adapter]
        if isinstance(a, nn.Linear) and isinstance(b, nn.Linear):
            both = places.get(a.weight), places.get(b.weight)
            if both != (None, None):
                if adapter in getattr(module, "lora_magnitude_vector", {}):
                    raise ValueError(f"{name}: DoRA scales W + sBA by lengths, so its change is no sum: use plain LoRA")
                yield Linear(name, module, in_text, lora=both, adapter=adapter, width=a.in_features)


def uncovered(model: nn.Module, places: dict[Any, int], layers: Collection[Linear]) -> list[str]:
    """Names of an optimizer's parameters in a model that belong to none of these layers."""
    held = {i for layer in layers for i in layer.places}
    return [name for name, p in model.named_parameters() if p.requires_grad and places.get(p, -1) not in {-1, *held}]


@contextmanager
def watching(layers: Sequence[Linear], see: Any, text_module: nn.Module | None = None) -> Iterator[set[Linear]]:
    """Inside, ``see(layer, x, y)`` is called with what enters a layer, and what it makes of it.

    Not when gradient checkpointing runs it again.

    Args:
        layers: those to watch.
        see: called for each of their runs.
        text_module: the decoder, for ``layer.after``.

    Yields:
        the layers that were run so far.
    """
    called: set[Linear] = set()
    state = {"after": False}

    def hook(layer: Linear) -> Any:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            if torch._C._current_graph_task_id() == -1:
                called.add(layer)
                layer.after = state["after"]
                see(layer, args[0] if args else next(iter(kwargs.values())), y)

        return call

    handles = [layer.module.register_forward_hook(hook(layer), with_kwargs=True) for layer in layers]
    if text_module is not None:
        handles.append(text_module.register_forward_pre_hook(lambda *args: state.update(after=False)))
        handles.append(text_module.register_forward_hook(lambda *args: state.update(after=True)))
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def rows(x: Tensor, mask: Tensor, layer: Linear, batch: Any = None) -> Tensor | None:
    """Which of a layer's inputs are at marked tokens: bool, one for each row of the input; None for all of them.

    A layer outside the text decoder sees pictures alone, or has a sequence of its own, unless it is run behind the
    decoder and what enters it has a row for each token. The head may be run on a part
    of the sequence, which the batch tells by ``logits_to_keep``; where it does not, no row is marked, with a warning.

    Raises:
        ValueError: a layer of the decoder sees another sequence than that of the mask.
    """
    if not layer.in_text:
        return mask if layer.after and _fits(x, mask) else None
    if _fits(x, mask):
        return mask
    if layer.head:
        kept = _kept(mask, batch)
        if kept is not None and _fits(x, kept):
            return kept
        warnings.warn(
            f"{layer.name} is run on a part of the sequence, and the batch has no 'logits_to_keep' that says on which: "
            "what enters it is not counted",
            stacklevel=2,
        )
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    raise ValueError(
        f"the mask has shape {tuple(mask.shape)}, the input of {layer.name} {tuple(x.shape)}: the model changed the "
        "sequence, so its tokens need a mask of their own"
    )


def _fits(x: Tensor, mask: Tensor) -> bool:
    """Whether rows are tokens: as they are, one behind the other, or with dimensions of 1 as in latent attention."""
    if x.dim() == 2 and len(x) == mask.numel():
        return True
    return [n for n in x.shape[:-1] if n != 1] == [n for n in mask.shape if n != 1]


def _kept(mask: Tensor, batch: Any) -> Tensor | None:
    """The mask at the tokens whose logits a batch asks for: the last so many, or those of these indices."""
    keep = None if batch is None else batch.get("logits_to_keep")
    if isinstance(keep, int):
        return mask[:, -keep:]
    return mask[:, keep.to(mask.device)] if isinstance(keep, Tensor) and keep.dim() == 1 else None


def prompt_tokens(batch: Any) -> Tensor:
    """Tokens of a batch that are read and not answered: attended, and -100 in its labels; bool, (batch, tokens).

    Where ``logits_to_keep`` asks for the logits of some tokens alone, labels may be there for these alone, as ms-swift
    cuts them: the first is of no use, and each other one is of the token behind a kept one.

    Raises:
        ValueError: the batch has no ``input_ids``, or labels of another length.
    """
    if batch is None or "input_ids" not in batch:
        raise ValueError(f"prompt tokens are found in 'input_ids', and the batch has only {sorted(batch or ())}")
    mask = attended_tokens(batch)
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        return mask
    if labels.shape == mask.shape:
        return mask & (labels == -100)
    places = _kept(torch.arange(mask.shape[1], dtype=torch.int64, device=mask.device)[None], batch)
    if places is None or places.shape[1] != labels.shape[1]:
        raise ValueError(
            f"'labels' has shape {tuple(labels.shape)}, 'input_ids' {tuple(mask.shape)}, and no 'logits_to_keep' says "
            "of which tokens they are"
        )
    mask = mask.clone()
    mask[:, places[0, :-1] + 1] &= labels[:, 1:] == -100
    return mask


def attended_tokens(batch: Any) -> Tensor:
    """Tokens of a batch that are no padding; bool, (batch, tokens)."""
    attention: Tensor | None = batch.get("attention_mask")
    if attention is None or attention.shape != batch["input_ids"].shape:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    return attention.bool()

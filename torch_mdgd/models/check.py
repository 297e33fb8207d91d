"""Which tokens a model replaces by pictures, seen without any name: what enters its decoder there is no embedding."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class _Seen(BaseException):
    """The decoder's input is there."""


@torch.no_grad()
def replaced_tokens(
    model: Callable[..., Any], text_module: nn.Module, table: nn.Module, batch: Mapping[str, Any]
) -> Tensor | None:
    """Tokens whose input to the decoder is not their row of the embedding table.

    Args:
        model: called as ``model(**batch)``, as far as its text module.
        text_module: the decoder.
        table: the model's input embeddings.
        batch: with ``input_ids``.

    Returns:
        bool, shape (batch, tokens); None where it cannot be seen: the decoder gets no embeddings, or all of them are
        scaled or moved on the way.
    """
    entered: list[Any] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(kwargs.get("inputs_embeds"))
        raise _Seen

    handle = text_module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        model(**batch)
    except _Seen:
        pass
    finally:
        handle.remove()
    x = entered[0] if entered else None
    ids: Tensor = batch["input_ids"]
    if not isinstance(x, Tensor) or x.shape[:2] != ids.shape:
        return None
    known = ids < getattr(table, "num_embeddings", 1 << 62)
    found = (table(ids.where(known, 0)) != x).any(-1) | ~known
    return None if bool(found.all()) else found

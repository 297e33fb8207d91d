"""φ beside the parameters as ZeRO holds them, and exchanged with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_mdgd.integrations.deepspeed.partition import gather, held_of, is_partitioned, padded, release
from torch_mdgd.integrations.deepspeed.refused import refuse_engine
from torch_mdgd.loss import Reference


class ZeroReference(Reference):
    """φ of a model in DeepSpeed's engine: a copy of what this process holds of the trained parameters.

    With ZeRO-3 that is a part of them; with ZeRO-1 and 2 it is all of them, in the precision of the model. It is a
    ``reference`` for :func:`torch_mdgd.loss.visual_loss`, too.

    Args:
        engine: of ``deepspeed.initialize`` or accelerate. Its weights now are φ.

    Raises:
        ValueError: no parameter of the model requires gradients; an option of ZeRO that is not supported.
    """

    def __init__(self, engine: Any) -> None:
        refuse_engine(engine)
        self.engine, self.model = engine, engine.module
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("ZeroReference: no parameter of the model requires gradients")
        self.names, self.trained = [name for name, _ in named], [p for _, p in named]
        self.values = [held_of(p).clone() for p in self.trained]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """φ is in the model here."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # What was gathered is of the other values.
        release(self.engine)
        for p, x in zip(self.trained, self.values, strict=True):
            held = held_of(p)
            before = held.clone()
            held.copy_(x)
            x.copy_(before)
        torch.clear_autocast_cache()

    def is_there(self) -> bool:
        """Whether no parameter has left φ, as far as this process holds them."""
        return all(torch.equal(held_of(p), x) for p, x in zip(self.trained, self.values, strict=True))

    def theta(self, i: int) -> Tensor:
        """The whole value of a parameter; with ZeRO-3 all processes call it."""
        p: Any = self.trained[i]
        here = not is_partitioned(p) or p.ds_status.name == "AVAILABLE"
        whole: Tensor = p.detach() if here else gather(p, held_of(p))
        return whole

    def phi(self, i: int) -> Tensor:
        """The whole value of a parameter at φ; with ZeRO-3 all processes call it."""
        p = self.trained[i]
        return gather(p, self.values[i]) if is_partitioned(p) else self.values[i]

    @torch.no_grad()
    def set(self, i: int, whole: Tensor) -> None:
        """Let φ of a parameter be this, a tensor of its whole shape."""
        p: Any = self.trained[i]
        if is_partitioned(p):
            size = self.values[i].numel()
            group = p.ds_process_group
            whole = padded(whole, size * dist.get_world_size(group))[size * dist.get_rank(group) :][:size]
        self.values[i].copy_(whole.view(self.values[i].shape))

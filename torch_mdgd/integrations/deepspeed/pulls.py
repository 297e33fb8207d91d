"""The anchor's pull inside a backward pass of the engine, where ZeRO-3 has gathered the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd.integrations.deepspeed.partition import set_gradient
from torch_mdgd.integrations.deepspeed.step import ZeroStep, anchors_in
from torch_mdgd.models.linear import Linear
from torch_mdgd.rules.anchor import Anchor


class Pulls:
    """The anchor's pull in a backward pass: of each layer in its own, where ZeRO-3 has gathered its weights."""

    def __init__(self, step: ZeroStep) -> None:
        self.step = step
        self.due: list[Anchor] = []
        # What the pass's loss is multiplied with, once it has begun.
        self.scale: Tensor | None = None
        self.micro_batches = 1
        # The places of parameters that were pulled.
        self.done: set[int] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> "Pulls":
        for anchor in anchors_in(self.step.rule):
            for layer in anchor.layers:
                self._handles += [self._hook(anchor, layer, *one) for one in _owners(layer)]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """The forward pass has ended: take in what it brought to the layers."""
        self.due = self.step.anchors()

    def finish(self) -> None:
        """The backward pass has ended: pull the layers that it did not go through, and an earlier micro-batch did."""
        from deepspeed.utils import safe_get_full_grad

        for anchor in self.due:
            for layer in anchor.layers:
                places = [i for i in layer.places if i not in self.done]
                gradients = {i: safe_get_full_grad(self.step.trained[i]) for i in places}
                if any(x is not None and bool(x.any()) for x in gradients.values()):
                    found = self._of(anchor, layer)
                    for i, x in gradients.items():
                        if x is not None:
                            set_gradient(self.step.trained[i], x + found[i].to(x.dtype))

    def _of(self, anchor: Anchor, layer: Linear) -> dict[int, Tensor]:
        assert self.scale is not None
        reference, scale = self.step.reference, float(self.scale) * self.micro_batches
        return anchor.pull_of(layer, reference.theta, reference.phi, scale)

    def _hook(self, anchor: Anchor, layer: Linear, module: nn.Module, places: list[int]) -> Any:
        def pull() -> list[Tensor | None]:
            # A layer that is run several times is pulled once.
            if not self.done.isdisjoint(places) or not any(anchor is one for one in self.due):
                return [None] * len(places)
            self.done |= set(places)
            found = self._of(anchor, layer)
            return [found[i].to(self.step.trained[i].dtype) for i in places]

        def call(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            parameters = [self.step.trained[i] for i in places]
            out: Tensor = _Pull.apply(y, pull, *parameters)  # type: ignore[no-untyped-call]
            return out

        # Before the hook of ZeRO-3 after which weights are not whole any more.
        return module.register_forward_hook(call, prepend=True)


def _owners(layer: Linear) -> list[tuple[nn.Module, list[int]]]:
    """The modules that hold a layer's trained parameters, and where these stand."""
    module: Any = layer.module
    if layer.lora is None:
        return [(module, layer.places)]
    both = zip((module.lora_A, module.lora_B), layer.lora, strict=True)
    return [(matrices[layer.adapter], [i]) for matrices, i in both if i is not None]


class _Pull(torch.autograd.Function):
    """A layer's output as it is; the layer's parameters get a gradient besides."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, pull: Callable[[], list[Tensor | None]], *parameters: Tensor) -> Tensor:
        ctx.pull = pull
        # A copy: models may change what a layer returns in place.
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad, None, *ctx.pull())


class Scale(torch.autograd.Function):
    """A loss as it is, and what the engine multiplies it with."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, pulls: Pulls, micro_batches: int) -> Tensor:
        """The loss."""
        ctx.pulls = pulls
        pulls.micro_batches = micro_batches
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient that comes in is the factor."""
        ctx.pulls.scale = grad
        return grad, None, None

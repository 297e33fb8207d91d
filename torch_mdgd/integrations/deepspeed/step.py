"""One step: this process's parts of the gradients by kind, and what the rule makes of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_mdgd import kernels
from torch_mdgd.integrations.deepspeed.partition import all_parts, padded, set_gradient, shape_of
from torch_mdgd.integrations.deepspeed.reference import ZeroReference
from torch_mdgd.kernels import Tensors
from torch_mdgd.kernels.exact import exact
from torch_mdgd.parallel.ranks import Ranks
from torch_mdgd.rules.anchor import Anchor
from torch_mdgd.rules.around import Around
from torch_mdgd.rules.base import KINDS, Rule, decoupled_


def anchors_in(rule: Rule) -> list[Anchor]:
    """The anchors around a rule, and itself if it is one."""
    found: Any = rule
    anchors = []
    while isinstance(found, Around):
        if isinstance(found, Anchor):
            anchors.append(found)
        found = found.rule
    return anchors


class ZeroStep:
    """What one step of an engine is made of.

    Args:
        engine: DeepSpeed's.
        rule: what makes d.
        reference: φ.

    Attributes:
        weights: the rule's, by name: float64, shape (T,), on the CPU.
        parts: of the step under way, by kind: this process's parts of gradients, flat, float32.
        products: the last step's table of inner products, if g and v were taken apart.
    """

    def __init__(self, engine: Any, rule: Rule, reference: ZeroReference) -> None:
        self.engine, self.rule, self.reference, self.trained = engine, rule, reference, reference.trained
        rule.attach(self.trained, masked=False)
        size = (len(self.trained),)
        self.weights = {
            name: torch.full(size, x, dtype=torch.float64, device="cpu") for name, x in rule.weights.items()
        }
        self.ranks = Ranks(engine.module, engine.data_parallel_group)
        rule.sum_over(self.ranks.groups)
        self.parts: dict[str, list[Tensor | None]] = {}
        self.products: Tensor | None = None

    def forget(self) -> None:
        """Forget what was taken, and what the rule has seen."""
        self.parts = {}
        self.rule.forget()

    def finish_at_once(self) -> None:
        """Tell the rule of a step whose d was made by one backward pass."""
        lone = torch.full((len(self.trained), 1, 1), float("nan"), dtype=torch.float64, device="cpu")
        self.rule.coefficients(lone, self.weights, False)
        self.products = None

    def anchors(self) -> list[Anchor]:
        """The anchors whose pull comes at this step, which they count."""
        return [anchor for anchor in anchors_in(self.rule) if anchor.begin_pull(self.trained)]

    @contextmanager
    def taking(self, kind: str) -> Iterator[None]:
        """A backward pass inside leaves its gradients here, and zeros to the engine."""
        parts = self.parts.setdefault(kind, [None] * len(self.trained))

        def take(i: int) -> Callable[[Tensor], Tensor]:
            def hook(grad: Tensor) -> Tensor:
                part = self._part(self._mean(grad.detach().float()))
                held = parts[i]
                parts[i] = part if held is None else held.add_(part)
                return torch.zeros_like(grad)

            return hook

        handles = [p.register_hook(take(i)) for i, p in enumerate(self.trained)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mean(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=self.engine.data_parallel_group)
        return x.div_(dist.get_world_size(self.engine.data_parallel_group))

    def _part(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor, flattened, as ZeRO-3 divides it."""
        group = self.engine.data_parallel_group
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        size = -(-whole.numel() // world)
        return padded(whole, size * world)[size * rank :][:size].clone()

    @torch.no_grad()
    def combine(self) -> None:
        """Put d of what was taken where the engine looks for gradients."""
        missing = [None] * len(self.trained)
        g, v, g0, v0 = (self.parts.get(kind, list(missing)) for kind in KINDS)
        if any(x is not None for x in g0):
            g0 = decoupled_(g0, v0, self.rule.drift, self._sums)
        gradients = [g, v, g0]
        while len(gradients) > 1 and all(x is None for x in gradients[-1]):
            gradients.pop()
        products = self._sums(gradients)
        self.products = products
        for anchor in self.anchors():
            for layer in anchor.layers:
                for i, x in anchor.pull_of(layer, self.reference.theta, self.reference.phi, self._scale()).items():
                    own = g[i]
                    if own is not None:
                        own += self._part(x.float())
        w = {name: x.to(products.device) for name, x in self.weights.items()}
        coefficients = self.rule.coefficients(products, w, False)
        d = [next((x for x in xs if x is not None), None) for xs in zip(*gradients, strict=True)]
        kernels.combine_(d, gradients, coefficients)
        for p, part in zip(self.trained, d, strict=True):
            if part is not None:
                whole = all_parts(part, self.engine.data_parallel_group)
                set_gradient(p, whole[: torch.Size(shape_of(p)).numel()].view(shape_of(p)))

    def _sums(self, rows: Sequence[Tensors], columns: Sequence[Tensors] | None = None) -> Tensor:
        """Inner products of whole gradients, from their parts."""
        with exact({p.device for p in self.trained}):
            products = kernels.inner_products(rows, columns)
        dist.all_reduce(products, group=self.engine.data_parallel_group)
        return products

    def _scale(self) -> float:
        """The loss scale of float16 training, 1 otherwise."""
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0))

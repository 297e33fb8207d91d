"""The forward and backward passes over one micro-batch."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from torch_mdgd.integrations.deepspeed.partition import is_partitioned
from torch_mdgd.integrations.deepspeed.pulls import Pulls, Scale
from torch_mdgd.integrations.deepspeed.refused import require_alike
from torch_mdgd.integrations.deepspeed.step import ZeroStep
from torch_mdgd.models.noise import without_noise
from torch_mdgd.models.passes import loss_of
from torch_mdgd.models.tap import Batch, VisualTap, image_tokens, visual_alignment_loss
from torch_mdgd.models.traces import Traces
from torch_mdgd.models.vision_cache import reuse_frozen_parts
from torch_mdgd.rules.base import KINDS


class Passes:
    """The forward and backward passes over one micro-batch."""

    def __init__(
        self,
        step: ZeroStep,
        tap: VisualTap,
        alignment: Literal["l1", "mse"],
        batch: Batch,
        loss: Callable[[Batch], Tensor] | None,
        visual_weight: float,
        last: bool,
        scale_wrt_gas: bool,
    ) -> None:
        self.step, self.batch, self.loss, self.last, self.scale_wrt_gas = step, batch, loss, last, scale_wrt_gas
        self.engine, self.rule, self.tap, self.alignment = step.engine, step.rule, tap, alignment
        self.images = image_tokens(self.tap, batch)
        require_alike(batch, step.ranks, self.images.device)
        self.pictures, self.share = step.ranks.share(self.images.sum())
        self.visual_weight = visual_weight * self.share
        self.traces = Traces(self.engine.module)

    def sparing(self) -> Any:
        """No frozen part runs twice inside, where parameters are not partitioned."""
        partitioned = any(map(is_partitioned, self.step.trained))
        return nullcontext() if partitioned else reuse_frozen_parts(self.engine.module, self.step.trained)

    def at_once(self, alpha: float | None) -> tuple[Tensor, Tensor | None]:
        """Task loss and L_v, from one backward pass of L + αL_v, or of L."""
        z_reference, visual_loss = None, None
        if self.pictures and alpha is not None:
            with self.step.reference():
                z_reference = self.features()
        with ExitStack() as stack:
            pulls = stack.enter_context(Pulls(self.step)) if self.last else None
            with self.rule.observe(self.images, self.batch):
                task_loss, z = self.forward()
            total: Any = task_loss
            if z_reference is not None and alpha is not None:
                z_reference = self.comparable(z, z_reference)
                self.rule.saw_features(z, z_reference, self.step.ranks.mean)
                visual_loss = visual_alignment_loss(z, z_reference, self.alignment)
                total = total + visual_loss * (alpha * self.visual_weight)
            if pulls is not None:
                pulls.begin()
                micro_batches = self.engine.gradient_accumulation_steps() if self.scale_wrt_gas else 1
                total = Scale.apply(total, pulls, micro_batches)  # type: ignore[no-untyped-call]
            if alpha is not None and visual_loss is None:
                visual_loss = torch.zeros_like(task_loss, dtype=torch.float32)
            self.backward(total, self.last)
        if pulls is not None:
            pulls.finish()
            self.step.finish_at_once()
        return task_loss.detach(), None if visual_loss is None else visual_loss.detach()

    def one_at_a_time(self) -> tuple[Tensor, Tensor]:
        """Task loss and L_v, from a forward and a backward pass for each gradient."""
        seen = self.pictures or any(x is not None for x in self.step.parts.get("visual", ()))
        w = self.step.weights
        needs = self.rule.needs(w, False) if seen or not self.last else KINDS[:1]
        z_reference, visual_loss = None, None
        if needs == KINDS:
            z = self.features() if self.pictures else None
            with self.step.reference():
                if z is not None:
                    z_reference = self.visual("reference_visual", z)[1]
                with self.traces.aside():
                    self.take("reference_task", self.forward()[0])
        elif self.pictures:
            with self.step.reference():
                z_reference = self.features()
        if needs == KINDS[:1]:
            # Of earlier micro-batches, which could not know that no picture would follow.
            for kind in KINDS[2:]:
                self.step.parts.pop(kind, None)
        if z_reference is not None:
            visual_loss = self.visual("visual", z_reference)[0]
        with self.rule.observe(self.images, self.batch):
            task_loss, _ = self.forward()
        self.take("task", task_loss, self.last)
        if self.last:
            self.step.combine()
        return task_loss.detach(), torch.zeros_like(task_loss).float() if visual_loss is None else visual_loss

    def visual(self, kind: str, z_fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Take the gradient of L_v; returns L_v and z, without a graph."""
        with self.traces.aside():
            task_loss, z = self.forward()
            z_fixed = self.comparable(z, z_fixed)
            if kind == "visual":
                self.rule.saw_features(z, z_fixed, self.step.ranks.mean)
            visual_loss = visual_alignment_loss(z, z_fixed, self.alignment)
            # The engine looks for the beginning of a backward pass where the model's output is.
            self.take(kind, visual_loss * self.visual_weight + 0 * task_loss)
        return visual_loss.detach(), z.detach()

    def take(self, kind: str, loss: Tensor, last: bool = False) -> None:
        """A backward pass whose gradients are kept here, and not by the engine."""
        with self.step.taking(kind):
            self.backward(loss, last)

    def backward(self, loss: Tensor, last: bool) -> None:
        """The engine's."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=self.scale_wrt_gas)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Task loss and z, with their graph."""
        output, z = self.tap(self.run, self.batch)
        loss = loss_of(output)
        if loss is None:
            raise RuntimeError("MDGDEngine: the model returned no loss; does the batch have labels?")
        return loss, z

    def features(self) -> Tensor:
        """Z, without a graph and without a trace. Whole passes: the engine counts on their ends."""
        with self.traces.aside(), torch.no_grad():
            return self.tap.features(self.run, self.batch, whole=True)

    def run(self, **inputs: Any) -> Any:
        """What is run."""
        return self.engine(**inputs) if self.loss is None else self.loss(inputs)

    def comparable(self, z: Tensor, z_fixed: Tensor) -> Tensor:
        """What z is compared with, so that no rounding is taken for drift."""

        def anywhere(here: bool) -> bool:
            return bool(self.step.ranks.mean(torch.tensor(float(here), dtype=torch.float32, device=z.device)) > 0)

        return without_noise(
            z, z_fixed, self.features, self.tap.text_module, unmoved=self.step.reference.is_there, anywhere=anywhere
        )

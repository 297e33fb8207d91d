"""The passes of one training step, in place of ``loss.backward()``."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_mdgd.optimizer import MDGDOptimizer
from torch_mdgd.visual import Batch, VisualTap, visual_alignment_loss


def mdgd_backward(
    model: nn.Module,
    optimizer: MDGDOptimizer,
    batch: Batch,
    *,
    tap: VisualTap | None = None,
    alignment: Literal["l1", "mse"] = "l1",
    weight: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
    combine: bool = True,
) -> Tensor:
    """Capture every gradient that the optimizer's update needs from one batch, and leave d in ``.grad``.

    With gradients at the reference: 3 forward and 4 backward passes, one graph at a time (z(θ) without a graph, then
    φ, then θ); without: 2 and 2. All forward passes see the same random numbers, so that dropout makes no drift; the
    model stays in the mode, train or eval, that it is in.

    Args:
        model: called as ``model(**batch)``; its output has a ``loss``.
        optimizer: wraps the optimizer of the model's trainable parameters.
        batch: inputs and labels, on the model's device.
        tap: where z comes from; ``VisualTap.for_model(model)`` if None.
        alignment: the form of L_v (5).
        weight: multiplies both losses; 1/k for the mean over k micro-batches.
        scaler: scales the losses of float16 training; unscale and clip ``.grad`` afterwards as usual.
        combine: False for all but the last micro-batch of a step, so that gradients add up before the update is
            formed, which is not linear in them.

    Returns:
        the task loss, detached, without weight or scale. L_v is in ``optimizer.diagnostics["visual_loss"]``.

    An exception discards all that was captured for this step.

    Raises:
        TypeError: ``optimizer`` is not an :class:`MDGDOptimizer`.
        RuntimeError: the model returns no loss, or no trainable parameter influences z.
    """
    if not isinstance(optimizer, MDGDOptimizer):
        raise TypeError(f"mdgd_backward: optimizer must be an MDGDOptimizer, got {type(optimizer).__name__}")
    tap = tap or VisualTap.for_model(model)
    random = _Randomness(next(model.parameters()).device)

    def backward(z_fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass and two backward passes; returns task loss, L_v and z, without graphs."""
        random.rewind()
        output, z = tap(model, batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            raise RuntimeError("mdgd_backward: the model returned no loss; does the batch have labels?")
        visual_loss = visual_alignment_loss(z, z_fixed, alignment)
        if z.numel() == 0:
            optimizer.set_gradients(**{optimizer.role("visual"): [None] * len(optimizer.parameters)})
        elif not z.requires_grad:
            raise RuntimeError("mdgd_backward: no trainable parameter influences the hidden states at image tokens")
        else:
            with optimizer.capture("visual", scale=scale):
                scaled(visual_loss).backward(retain_graph=True)
        with optimizer.capture("task", scale=scale):
            scaled(loss).backward()
        return loss.detach(), visual_loss.detach(), z.detach()

    def features() -> Tensor:
        random.rewind()
        with torch.no_grad():
            return tap(model, batch)[1]

    scale = 1.0 if scaler is None else scaler.get_scale()

    def scaled(loss: Tensor) -> Any:
        return loss * weight if scaler is None else scaler.scale(loss * weight)

    try:
        if len(optimizer.required_roles) == 4:
            z = features()
            with optimizer.reference():
                z_reference = backward(z)[2]
            if combine:
                optimizer.reduce_reference()
        else:
            with optimizer.reference():
                z_reference = features()
        loss, visual_loss, _ = backward(z_reference)
    except BaseException:
        # Half of a batch's gradients would count twice when the batch is tried again.
        optimizer.discard()
        raise
    optimizer.record(visual_loss=visual_loss)
    if combine:
        optimizer.combine()
    return loss


class _Randomness:
    """The state of the random generators when a step began."""

    def __init__(self, device: torch.device) -> None:
        self.cpu = torch.get_rng_state()
        self.module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self.device = device
        self.state = None if self.module is None else self.module.get_rng_state(device)

    def rewind(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.module is not None:
            self.module.set_rng_state(self.state, self.device)

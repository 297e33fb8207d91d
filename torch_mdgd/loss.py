"""The visual alignment loss as a plain loss, for those who own no optimizer.

It goes into any Trainer's ``compute_loss``, and into engines that hide gradients.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_mdgd.models.noise import without_noise
from torch_mdgd.models.parts import has_to_finish
from torch_mdgd.models.passes import known_of
from torch_mdgd.models.tap import Batch, VisualTap, visual_alignment_loss
from torch_mdgd.models.traces import Traces
from torch_mdgd.optimizer import MDGDOptimizer
from torch_mdgd.rules.mdgd import MDGD


class Reference:
    """φ of a model without an MDGDOptimizer: its trained parameters as they are now.

    Adapters of peft that begin as nothing, as LoRA's do, need no copy: at φ they are switched off.

    Args:
        model: the model that is trained.

    Raises:
        ValueError: no parameter of the model requires gradients.
        TypeError: a kind of parallelism that hides parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("Reference: no parameter of the model requires gradients")
        # It never steps: it holds φ, and knows how to exchange it.
        self._holder = MDGDOptimizer(torch.optim.SGD(trained, lr=0.0), MDGD(regularize=0))
        self.off = self._holder.drop_reference(model)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """φ is in the model here. Autograd refuses a backward pass across it."""
        with self._holder.reference(self.model):
            yield


def visual_loss(
    model: nn.Module,
    batch: Batch,
    *,
    reference: Reference | MDGDOptimizer | nn.Module,
    tap: VisualTap | None = None,
    alignment: Literal["l1", "mse"] = "l1",
) -> tuple[Any, Tensor]:
    """Run the model on a batch, and compare its features at image tokens with those at φ.

    ``output, visual = visual_loss(model, batch, reference=reference)``, then ``(output.loss + α * visual).backward()``,
    gives d = g + αv of :class:`torch_mdgd.rules.MDGD` with ``regularize=0``. A pass at φ without a graph comes first.
    In several processes L_v is of each one's own image tokens: the mean of their means, where ``mdgd_backward`` takes
    that over all tokens. With ``fully_shard`` every process has to have pictures, or none.

    Args:
        model: called as ``model(**batch)``.
        batch: its inputs.
        reference: where φ is: a :class:`Reference`, an MDGDOptimizer, or a second model, of which no pass leaves a
            trace: its buffers, its mode and the random generators are afterwards as they were.
        tap: where z comes from; ``VisualTap.for_model(model)`` if None.
        alignment: the form of L_v (5).

    Returns:
        the model's output, and L_v, a float32 scalar with its graph; 0 without image tokens.
    """
    tap = tap or VisualTap.for_model(model)
    # Dropout must not make a difference.
    traces = Traces(model)
    if isinstance(reference, nn.Module):
        there = VisualTap.for_model(reference, tap.layers)
        known_of(there.text_module).other_kernels = known_of(tap.text_module).other_kernels
        # Its own buffers too are as before, and its pass sees the same random numbers.
        with Traces(reference).aside():
            z_reference = _features(there, reference, batch)
    else:
        at_reference: AbstractContextManager[Any] = (
            reference() if isinstance(reference, Reference) else reference.reference(model)
        )
        with at_reference, traces.aside():
            z_reference = _features(tap, model, batch)
    output, z = tap(model, batch)

    def again() -> Tensor:
        with traces.aside():
            return _features(tap, model, batch)

    return output, visual_alignment_loss(z, without_noise(z, z_reference, again, tap.text_module), alignment)


def _features(tap: VisualTap, model: nn.Module, batch: Batch) -> Tensor:
    return tap.features(model, batch, whole=True) if has_to_finish(model) else tap.features(model, batch)

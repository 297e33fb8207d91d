"""The visual alignment loss as a plain loss, for those who own no optimizer.

It goes into any Trainer's ``compute_loss``, and into engines that hide gradients.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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

    Of a parameter that is trained only later, φ is its value at the first call after it requires gradients. Adapters of
    peft that begin as nothing, as LoRA's do, need no copy: at φ they are switched off.

    Args:
        model: the model that is trained.

    Raises:
        ValueError: no parameter of the model requires gradients.
        TypeError: a kind of parallelism that hides parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parameters = list(model.parameters())
        if not any(p.requires_grad for p in parameters):
            raise ValueError("Reference: no parameter of the model requires gradients")
        # It never steps: it holds φ, and knows how to exchange it.
        self._holder = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.0), MDGD(regularize=0))
        self.off = self._holder.drop_reference(model)
        if not self.off:
            # No warning of weights that are loaded from here on: φ is what was there.
            self._holder.set_reference()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """φ is in the model here. Autograd refuses a backward pass across it.

        Raises:
            ValueError: the model has a trained parameter that it had not when this was made, naming it.
        """
        known = set(self._holder.parameters)
        if any(p.requires_grad and p not in known for p in self.model.parameters()):
            name = next(name for name, p in self.model.named_parameters() if p.requires_grad and p not in known)
            raise ValueError(
                f"Reference: {name} is trained, and was no parameter of the model when the reference was made, so its "
                "φ is not known: make the reference once adapters are in the model and embeddings have their size"
            )
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
    traces = Traces(model)
    z_reference = _at_reference(tap, model, batch, reference, traces)
    output, z = tap(model, batch)
    return output, _compared(tap, model, batch, z, z_reference, traces, alignment)


class VisualLoss:
    """L_v of a model's last forward pass, for a loss function that sees outputs and labels alone.

    Such is ``compute_loss_func`` of the Trainer: ``loss + α * visual.take()``, with ``visual = VisualLoss(model)``,
    gives what :func:`visual_loss` does. Hooks see every pass of the model in training that has gradients: a pass at φ
    goes before it. :meth:`remove` takes them off.

    Args:
        model: called with the batch as keywords, also from inside DistributedDataParallel.
        reference: as of :func:`visual_loss`; the weights now if None.
        tap: as of :func:`visual_loss`.
        alignment: as of :func:`visual_loss`.

    Raises:
        ValueError: no parameter of the model requires gradients.
        TypeError: a kind of parallelism that hides parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reference: Reference | MDGDOptimizer | nn.Module | None = None,
        tap: VisualTap | None = None,
        alignment: Literal["l1", "mse"] = "l1",
    ) -> None:
        self.reference = Reference(model) if reference is None else reference
        self.tap, self.alignment = tap or VisualTap.for_model(model), alignment
        self._visual: Tensor | None = None
        self._evaluating = False
        self._open: ExitStack | None = None
        self._aside = False
        # Before hooks that replace tokens by embeddings.
        before = model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        self._handles = [before, model.register_forward_hook(self._after, always_call=True)]

    def take(self) -> Tensor:
        """L_v of the last pass in training, a float32 scalar with its graph, once.

        Where the last pass had no gradients, as in an evaluation, and nothing is left to take, it is 0.

        Raises:
            RuntimeError: the model was not run in training, with gradients, since the last call.
        """
        if self._visual is None:
            if self._evaluating:
                return torch.zeros((), dtype=torch.float32, device="cpu")
            raise RuntimeError("VisualLoss: the model was not run in training, with gradients, since the last take()")
        visual, self._visual = self._visual, None
        return visual

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def _before(self, model: nn.Module, args: Any, batch: dict[str, Any]) -> None:
        if self._aside:
            return
        self._evaluating = not torch.is_grad_enabled()
        if self._evaluating or not model.training:
            return
        # An earlier pass's, whose graph would live on.
        self._visual = None
        traces = Traces(model)
        self._aside = True
        try:
            z_reference = _at_reference(self.tap, model, batch, self.reference, traces)
        finally:
            self._aside = False
        self._open = ExitStack()
        self._seen = batch, z_reference, traces, self._open.enter_context(self.tap.watching())

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._aside or self._open is None:
            return
        self._open.close()
        self._open = None
        batch, z_reference, traces, passes = self._seen
        del self._seen
        if output is None:
            # The pass has raised.
            return
        self._aside = True
        try:
            z = self.tap.of(passes, output, batch)
            self._visual = _compared(self.tap, model, batch, z, z_reference, traces, self.alignment)
        finally:
            self._aside = False


def _at_reference(
    tap: VisualTap, model: nn.Module, batch: Batch, reference: Reference | MDGDOptimizer | nn.Module, traces: Traces
) -> Tensor:
    """z(φ). Dropout must not make a difference: it sees the random numbers of the pass at θ."""
    if isinstance(reference, nn.Module):
        there = VisualTap.for_model(reference, tap.layers)
        known_of(there.text_module).other_kernels = known_of(tap.text_module).other_kernels
        # Its own buffers too are as before, and its pass sees the same random numbers.
        with Traces(reference).aside():
            return _features(there, reference, batch)
    at_reference: AbstractContextManager[Any] = (
        reference() if isinstance(reference, Reference) else reference.reference(model)
    )
    with at_reference, traces.aside():
        return _features(tap, model, batch)


def _compared(
    tap: VisualTap,
    model: nn.Module,
    batch: Batch,
    z: Tensor,
    z_reference: Tensor,
    traces: Traces,
    alignment: Literal["l1", "mse"],
) -> Tensor:
    def again() -> Tensor:
        with traces.aside():
            return _features(tap, model, batch)

    return visual_alignment_loss(z, without_noise(z, z_reference, again, tap.text_module), alignment)


def _features(tap: VisualTap, model: nn.Module, batch: Batch) -> Tensor:
    return tap.features(model, batch, whole=True) if has_to_finish(model) else tap.features(model, batch)

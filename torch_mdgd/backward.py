"""The passes of one training step, in place of ``loss.backward()``."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_mdgd.models.noise import without_noise
from torch_mdgd.models.passes import loss_of
from torch_mdgd.models.tap import Batch, VisualTap, image_tokens, pictures_in, visual_alignment_loss
from torch_mdgd.models.traces import Traces
from torch_mdgd.models.vision_cache import reuse_frozen_parts
from torch_mdgd.optimizer import MDGDOptimizer
from torch_mdgd.parallel.ranks import Ranks, gather_around
from torch_mdgd.rules.base import KINDS


def mdgd_backward(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    *,
    tap: VisualTap | None = None,
    loss: Callable[[Batch], Tensor] | None = None,
    alignment: Literal["l1", "mse"] = "l1",
    weight: float = 1.0,
    visual_weight: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    combine: bool = True,
    separate: bool = False,
    diagnose_every: int | None = None,
    reuse_vision: bool = True,
) -> Tensor:
    """Capture every gradient that the optimizer's update needs from one batch, and leave d in ``.grad``.

    With gradients at the reference: 3 forward and 4 backward passes, one graph at a time (z(θ) without a graph, then
    φ, then θ). Without: a forward pass at φ as far as the features, and one at θ; then one backward pass of L + αL_v
    where the rule allows it (``MDGD(regularize=0)``, and under a mask), else one for each loss. All forward passes see
    the same random numbers, so that dropout makes no drift; the model stays in the mode, train or eval, that it is in.

    A rule that needs the task gradient alone takes one forward and one backward pass in any case, and there is no L_v.

    A step without image tokens has no L_v, and nothing to be kept from: it is the wrapped optimizer's own, d = g
    (under a mask M ⊙ g), in one forward and one backward pass; with a warning if the batch holds pictures. A
    micro-batch without image tokens, in a step that may have some, adds to g and g0; a step that chooses its mask
    takes all gradients in any case.

    Args:
        model: called as ``model(**batch)``; its output has a ``loss``.
        optimizer: an :class:`MDGDOptimizer` over the model's trainable parameters; accelerate's and Lightning's too.
        batch: inputs and labels, on the model's device.
        tap: where z comes from; ``VisualTap.for_model(model)`` if None.
        loss: runs the model on the batch and returns the task loss; ``model(**batch).loss`` if None.
        alignment: the form of L_v (5).
        weight: multiplies both losses; 1/k for the mean over k micro-batches.
        visual_weight: multiplies L_v in its place, for a task loss that is normalised over all micro-batches already.
        scaler: scales the losses of float16 training; unscale and clip ``.grad`` afterwards as usual.
        combine: False for all but the last micro-batch of a step, so that gradients add up before the update is
            formed, which is not linear in them. Those of a step that is never made stay until the optimizer's
            ``zero_grad()``; the model's does not know of them.
        separate: take g and v apart even where one backward pass of L + αL_v gives d.
        diagnose_every: take them apart at one step of so many, so that ``cos_task_visual`` and ``visual_to_task`` of
            ``optimizer.diagnostics`` are there; between they are left out.
        reuse_vision: run the frozen parts of the vision tower, and the frozen layers at the beginning of the decoder,
            once and not in each pass; exact, see :func:`~torch_mdgd.models.vision_cache.reuse_frozen_parts`.

    Returns:
        the task loss, detached, without weight or scale. L_v is in ``optimizer.diagnostics["visual_loss"]``, of this
        micro-batch.

    An exception discards all that was captured for this step.

    In DistributedDataParallel or sharded by ``fully_shard``, each rank passes its part of the batch. d is the same on
    all, as of one process with the whole batch: L_v is the mean over all ranks' image tokens, the task loss that over
    ranks of their losses, and what is returned is this rank's own.

    Raises:
        TypeError: ``optimizer`` is not an :class:`MDGDOptimizer`; a kind of parallelism that is not supported.
        ValueError: a framework runs several processes, the model is not as it has wrapped it, and the optimizer was not
            told by ``average_over``.
        RuntimeError: the model returns no loss, or no trainable parameter influences z; sharded parameters, and only
            some ranks have image tokens.
    """
    wrapped = find_optimizer(optimizer)
    ranks = Ranks(model, wrapped.averaged_over)
    ranks.require_averaging(None if optimizer is wrapped else type(optimizer).__name__)
    if ranks.group is not None:
        wrapped.average_over(ranks.group)
    strangers = [] if ranks.sharded else _strangers(model, wrapped, ranks)
    tap = tap or VisualTap.for_model(model)
    wrapped.drop_reference(model)
    passes = _Passes(model, wrapped, batch, tap, loss, alignment, scaler, ranks)
    passes.strangers = strangers
    pictures, share = ranks.share(passes.images.sum())
    passes.weights = {"task": weight, "visual": share * (weight if visual_weight is None else visual_weight)}
    if not pictures:
        _warn_of_unmarked_pictures(batch)
    # Known of the last micro-batch alone: one without pictures before it may be followed by one that has some.
    seen = pictures or any(x is not None for x in wrapped.captured.get("visual", ()))
    needs = wrapped.needs(pictures=seen or not combine)
    wrapped.rule.sum_over(ranks.groups)
    try:
        with passes.sparing(reuse_vision), ranks.no_sync():
            alpha = None if separate else wrapped.joint(diagnose_every)
            if alpha is not None:
                task_loss, visual_loss = passes.jointly(alpha, pictures)
            elif "visual" in wrapped.needs():
                task_loss, visual_loss = passes.one_at_a_time(needs == KINDS, pictures, reduce=combine)
            else:
                task_loss, visual_loss = passes.task_alone(), None
    except BaseException:
        # Half of a batch's gradients would count twice when the batch is tried again.
        wrapped.discard()
        raise
    if visual_loss is not None:
        wrapped.record(visual_loss=ranks.mean(visual_loss * share))
    if combine and needs == KINDS[:1]:
        # Of earlier micro-batches, which could not know that no picture would follow.
        for kind in [kind for kind in wrapped.captured if kind.startswith("reference")]:
            del wrapped.captured[kind]
    if combine:
        wrapped.combine()
    return task_loss


def find_optimizer(optimizer: Optimizer) -> MDGDOptimizer:
    """The MDGDOptimizer inside whatever accelerate or Lightning has put around it.

    Raises:
        TypeError: there is none.
    """
    inner: Any = optimizer
    # A stand-in may be an instance too, by a class made for the purpose.
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, MDGDOptimizer):
        raise TypeError(f"mdgd_backward: optimizer must be an MDGDOptimizer, got {type(inner).__name__}")
    return inner


def _warn_of_unmarked_pictures(batch: Batch) -> None:
    """Not an error: some models get a blank picture with a text-only sample, so that all ranks run the same modules."""
    found = pictures_in(batch)
    if found:
        warnings.warn(
            f"mdgd_backward: the batch holds {found[0]}, but the tap marks no image token in it, so this is a step of "
            "the wrapped optimizer alone. If it should not be, the tap is not this model's, or the processor wrote no "
            "image tokens: look at tap.mask(batch), and pass tap=VisualTap(text_module, mask)",
            stacklevel=3,
        )


def _strangers(model: nn.Module, optimizer: MDGDOptimizer, ranks: Ranks) -> list[nn.Parameter]:
    """Trained parameters of the model that are not the optimizer's, with a warning if there are any."""
    own = set(optimizer.parameters)
    if not any(p.requires_grad and p not in own for p in ranks.parameters):
        return []
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and p not in own}
    if found:
        warnings.warn(
            f"mdgd_backward: {len(found)} parameters of the model require gradients and are not the optimizer's, "
            f"beginning with {next(iter(found))}: their .grad stays as it is. Freeze them with requires_grad_(False), "
            "which saves time, give them to the optimizer, or call mdgd_backward with their own MDGDOptimizer too",
            stacklevel=3,
        )
    return list(found.values())


class _Passes:
    """The forward and backward passes over one batch."""

    weights: dict[str, float]
    strangers: Sequence[nn.Parameter] = ()

    def __init__(
        self,
        model: nn.Module,
        optimizer: MDGDOptimizer,
        batch: Batch,
        tap: VisualTap,
        loss: Callable[[Batch], Tensor] | None,
        alignment: Literal["l1", "mse"],
        scaler: torch.amp.GradScaler | None,
        ranks: Ranks,
    ) -> None:
        self.model, self.optimizer, self.batch, self.ranks = model, optimizer, batch, ranks
        self.tap, self.loss, self.alignment, self.scaler = tap, loss, alignment, scaler
        self.images = image_tokens(tap, batch)
        self.traces = Traces(model)
        # Outer modules of accelerate's offloading, of torch.compile and of fully_shard have to finish their pass.
        self.whole = ranks.sharded or any("_hf_hook" in vars(m) or "_orig_mod" in m._modules for m in ranks.modules)
        # What replaces a module's forward, as a CUDA graph does, may hold addresses; accelerate's autocast does not.
        own = any("forward" in vars(m) and "_original_forward" not in vars(m) for m in ranks.modules)
        compiled = any(vars(m).get("_compiled_call_impl") is not None for m in ranks.modules)
        self.places = not (self.whole or own or compiled)

    def one_at_a_time(self, reference: bool, pictures: bool, reduce: bool) -> tuple[Tensor, Tensor]:
        """Task loss and L_v; every graph is used up before values are exchanged."""
        z_reference = None
        if reference:
            z = self.features() if pictures else None
            with self.optimizer.reference(self.model), self.traces.aside():
                task_loss, z_reference = self.forward()
                z = None if z is None else self.comparable(z_reference, z)
                self.both_gradients(task_loss, z_reference, z, "reference_visual")
            z_reference = z_reference.detach()
            del task_loss
            if reduce:
                self.optimizer.reduce_reference()
        elif pictures:
            z_reference = self.features_at_reference()
        with self.optimizer.rule.observe(self.images, self.batch):
            task_loss, z = self.forward()
        if not pictures:
            z_reference = None
        if z_reference is not None:
            if not reference:
                z_reference = self.comparable(z, z_reference)
            self.optimizer.rule.saw_features(z, z_reference, self.ranks.mean)
        visual_loss = self.both_gradients(task_loss, z, z_reference, "visual")
        return task_loss.detach(), visual_loss

    def jointly(self, alpha: float, pictures: bool) -> tuple[Tensor, Tensor]:
        """Task loss and L_v, from one backward pass of L + αL_v."""
        z_reference = self.features_at_reference() if pictures else None
        with self.optimizer.rule.observe(self.images, self.batch):
            task_loss, z = self.forward()
        if z_reference is not None:
            z_reference = self.comparable(z, z_reference)
        visual_loss = visual_alignment_loss(z, z if z_reference is None else z_reference, self.alignment)
        total = task_loss * self.weights["task"]
        if z_reference is not None:
            self.optimizer.rule.saw_features(z, z_reference, self.ranks.mean)
            total = total + visual_loss * (alpha * self.weights["visual"])
        self.backward("joint", total)
        return task_loss.detach(), visual_loss.detach()

    def task_alone(self) -> Tensor:
        """Task loss, from one forward and one backward pass."""
        with self.optimizer.rule.observe(self.images, self.batch):
            task_loss = _require_loss(self.run()[0])
        self.backward("task", task_loss)
        return task_loss.detach()

    @contextmanager
    def sparing(self, reuse: bool) -> Iterator[None]:
        """Nothing is computed inside that no pass needs: no cache of keys and values, no frozen part twice."""
        found = {id(c): c for m in self.ranks.modules if (c := vars(m).get("config")) is not None}
        configs = [c for c in found.values() if getattr(c, "use_cache", None) is True]
        for config in configs:
            config.use_cache = False
        try:
            with reuse_frozen_parts(self.model, self.optimizer.trained) if reuse else nullcontext():
                yield
        finally:
            for config in configs:
                config.use_cache = True

    def features(self) -> Tensor:
        """Z, without a graph and without a trace: no further than the text module, where the outer modules allow it."""
        run = self.prepared()

        def again(**inputs: Any) -> Any:
            # Where it is not known how often the loss runs the model, it may be called twice.
            self.traces.start.rewind()
            return run(**inputs)

        options = {"whole": True} if self.whole else {}
        with self.traces.aside(), torch.no_grad():
            return self.tap.features(run if self.loss is None else again, self.batch, **options)

    def features_at_reference(self) -> Tensor:
        with self.optimizer.reference(self.model, places=self.places):
            return self.features()

    def comparable(self, z: Tensor, z_fixed: Tensor) -> Tensor:
        """What z, of the weights that are in the model, is compared with, so that no rounding is taken for drift."""

        def anywhere(here: bool) -> bool:
            return bool(self.ranks.mean(torch.tensor(float(here), dtype=torch.float32, device=z.device)) > 0)

        return without_noise(
            z, z_fixed, self.features, self.tap.text_module, unmoved=self.optimizer.is_at_reference, anywhere=anywhere
        )

    def both_gradients(
        self, task_loss: Tensor, z: Tensor, z_fixed: Tensor | None, kind: Literal["visual", "reference_visual"]
    ) -> Tensor:
        """A backward pass for each loss of one graph; returns L_v, without a graph."""
        visual_loss = visual_alignment_loss(z, z if z_fixed is None else z_fixed, self.alignment)
        if z_fixed is None:
            self.optimizer.set_gradients(**{kind: [None] * len(self.optimizer.parameters)})
        else:
            # What gradient checkpointing runs again for it is run again for the next.
            with self.traces.aside(begin=False):
                self.backward("visual", visual_loss, retain_graph=True)
        self.backward("task", task_loss)
        return visual_loss.detach()

    def forward(self) -> tuple[Tensor, Tensor]:
        """Task loss and z, with their graph."""
        output, z = self.run()
        loss = _require_loss(output)
        if z.numel() and not z.requires_grad:
            raise RuntimeError(
                "mdgd_backward: no trainable parameter influences the hidden states at image tokens: train something "
                "before them, such as connector(model) or last_decoder_layers(model, 6), outside torch.no_grad(); with "
                "gradient checkpointing pass use_reentrant=False, as the other kind drops gradients"
            )
        return loss, z

    def prepared(self) -> Callable[..., Any]:
        """What is run."""
        loss: Any = self.loss
        return self.model if loss is None else lambda **inputs: loss(inputs)

    def run(self) -> tuple[Any, Tensor]:
        return self.tap(self.prepared(), self.batch)

    def backward(self, kind: Literal["task", "visual", "joint"], loss: Tensor, retain_graph: bool = False) -> None:
        if not loss.requires_grad:
            raise RuntimeError(
                f"mdgd_backward: nothing that the {kind} loss depends on requires gradients: is a parameter trainable, "
                "and this outside torch.no_grad()?"
            )
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        weighted: Any = loss if kind == "joint" else loss * self.weights[kind]
        if kind == "visual" and self.ranks.sharded:
            gather_around(self.tap.text_module, self.model)
        held = [p.grad for p in self.strangers]
        for p in self.strangers:
            # Not there for autograd to add to, in place.
            p.grad = None
        # Autocast is for forward passes; around this one it would round what the forward pass did not.
        try:
            with torch.autocast(loss.device.type, enabled=False), self.optimizer.capture(kind, scale=scale):
                (weighted if self.scaler is None else self.scaler.scale(weighted)).backward(retain_graph=retain_graph)
        finally:
            for p, x in zip(self.strangers, held, strict=True):
                p.grad = x


def _require_loss(output: Any) -> Tensor:
    loss = loss_of(output)
    if loss is None:
        raise RuntimeError("mdgd_backward: the model returned no loss; does the batch have labels?")
    return loss

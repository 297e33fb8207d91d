"""``MDGDEngine``: the passes of MDGD in DeepSpeed's engine, ZeRO-1, 2 and 3.

The engine owns parameters, gradients and the optimizer, so what changes d enters by its backward pass:

- Where one backward pass of L + αL_v gives d, that is the loss that the engine gets. The anchor's λ(W − W₀)C is
  added to the gradients of W in each layer's own backward pass, where W is whole.
- Other rules need g, v and those at φ apart. Hooks then take the gradients before the engine does, which gets zeros,
  and each process keeps its part of their means. d goes in by ``safe_set_full_grad``.

φ lies beside the parameters as they are held, with ZeRO-3 in the same partitions, and is exchanged with them.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_mdgd import kernels
from torch_mdgd.diagnostics import gradient_diagnostics
from torch_mdgd.kernels.exact import exact
from torch_mdgd.loss import Reference
from torch_mdgd.models.families import PICTURES
from torch_mdgd.models.linear import Linear
from torch_mdgd.models.noise import without_noise
from torch_mdgd.models.passes import loss_of
from torch_mdgd.models.tap import Batch, VisualTap, image_tokens, visual_alignment_loss
from torch_mdgd.models.traces import Traces
from torch_mdgd.models.vision_cache import reuse_frozen_parts
from torch_mdgd.parallel.ranks import Ranks
from torch_mdgd.rules.anchor import Anchor
from torch_mdgd.rules.around import Around
from torch_mdgd.rules.base import KINDS, PREFIX, Rule
from torch_mdgd.rules.mdgd import MDGD

FILE = "mdgd.safetensors"
FORMAT = "torch_mdgd engine 1"
REFERENCE, RULE = "reference.", "rule."
FSDP2 = "use fully_shard (FSDP2), by hand, in accelerate or in MDGDTrainer"


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
        _refuse_engine(engine)
        self.engine, self.model = engine, engine.module
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("ZeroReference: no parameter of the model requires gradients")
        self.names, self.trained = [name for name, _ in named], [p for _, p in named]
        self.values = [_held(p).clone() for p in self.trained]

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
        _release(self.engine)
        for p, x in zip(self.trained, self.values, strict=True):
            held = _held(p)
            before = held.clone()
            held.copy_(x)
            x.copy_(before)
        torch.clear_autocast_cache()

    def is_there(self) -> bool:
        """Whether no parameter has left φ, as far as this process holds them."""
        return all(torch.equal(_held(p), x) for p, x in zip(self.trained, self.values, strict=True))

    def theta(self, i: int) -> Tensor:
        """The whole value of a parameter; with ZeRO-3 all processes call it."""
        p: Any = self.trained[i]
        here = not _is_partitioned(p) or p.ds_status.name == "AVAILABLE"
        whole: Tensor = p.detach() if here else _gather(p, _held(p))
        return whole

    def phi(self, i: int) -> Tensor:
        """The whole value of a parameter at φ; with ZeRO-3 all processes call it."""
        p = self.trained[i]
        return _gather(p, self.values[i]) if _is_partitioned(p) else self.values[i]

    @torch.no_grad()
    def set(self, i: int, whole: Tensor) -> None:
        """Let φ of a parameter be this, a tensor of its whole shape."""
        p: Any = self.trained[i]
        if _is_partitioned(p):
            size = self.values[i].numel()
            group = p.ds_process_group
            whole = _padded(whole, size * dist.get_world_size(group))[size * dist.get_rank(group) :][:size]
        self.values[i].copy_(whole.view(self.values[i].shape))


class MDGDEngine:
    """A rule for a model in DeepSpeed's engine; d is what the engine's own optimizer gets.

    ::

        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=trained)
        mdgd = MDGDEngine(engine, MDGD(align=1, regularize=0))
        for batch in loader:
            loss = mdgd.backward(batch)
            engine.step()

    d is that of :func:`torch_mdgd.mdgd_backward` in one process with all processes' batches: L_v is the mean over all
    image tokens, the task loss that over processes of their losses. With ``MDGD(regularize=0)`` or ``Anchor``, also
    with ``every=k``, a micro-batch takes a forward pass at φ if it needs one, and one forward and one backward pass.
    Other rules take a forward and a backward pass for each gradient, and gather each trained parameter's gradient once
    for each kind: the published update has four.

    Args:
        engine: of ``deepspeed.initialize`` or accelerate. The reference φ is its weights now.
        rule: of :mod:`torch_mdgd.rules`; ``MDGD()``, the published update, if None. Its weights are the same for all
            parameters.
        tap: where z comes from; ``VisualTap.for_model`` of the engine's model if None.
        alignment: the form of L_v (5).

    Raises:
        ValueError: the engine has no ZeRO, or an option of it that is not supported; the rule corrects parameters after
            the step, as ``StepProject`` and ``ProtectInputs``; a parameter group has weights of its own.
        TypeError: ``rule`` is no rule; the model is not one of transformers, and ``tap`` is None.
    """

    def __init__(
        self,
        engine: Any,
        rule: Rule | None = None,
        *,
        tap: VisualTap | None = None,
        alignment: Literal["l1", "mse"] = "l1",
    ) -> None:
        rule = MDGD() if rule is None else rule
        _refuse_rule(rule)
        self.reference = ZeroReference(engine)
        _refuse_groups(engine)
        self.engine, self.rule, self.alignment = engine, rule, alignment
        self.tap = tap or VisualTap.for_model(engine.module)
        self.trained = self.reference.trained
        rule.attach(self.trained, masked=False)
        size = (len(self.trained),)
        self._weights = {
            name: torch.full(size, x, dtype=torch.float64, device="cpu") for name, x in rule.weights.items()
        }
        self.ranks = Ranks(engine.module, engine.data_parallel_group)
        rule.sum_over(self.ranks.groups)
        # Of the step under way, by kind: this process's parts of gradients, float32.
        self._parts: dict[str, list[Tensor | None]] = {}
        self._products: Tensor | None = None
        self._recorded: dict[str, Tensor] = {}
        # Whether the next micro-batch is the first of a step.
        self._begins = True

    def backward(
        self,
        batch: Batch,
        *,
        loss: Callable[[Batch], Tensor] | None = None,
        visual_weight: float = 1.0,
        boundary: bool | None = None,
        scale_wrt_gas: bool = True,
        separate: bool = False,
    ) -> Tensor:
        """All passes over one micro-batch, in place of ``engine.backward(engine(**batch).loss)``.

        Call ``engine.step()`` afterwards, as ever.

        Args:
            batch: inputs and labels of this process. All of them have pictures, or none has; where some have text
                alone, a blank picture that no token stands for keeps the modules that they run alike.
            loss: runs the engine on the batch and returns the task loss; ``engine(**batch).loss`` if None.
            visual_weight: multiplies L_v, for a task loss that is divided by the number of micro-batches already.
            boundary: whether this is the last micro-batch of a step; as the engine counts if None.
            scale_wrt_gas: of ``engine.backward``: divide by the engine's number of micro-batches.
            separate: take g and v apart even where one backward pass gives d, for :attr:`diagnostics`.

        Returns:
            the task loss, detached, of this process.

        Raises:
            RuntimeError: the model returns no loss; only some processes have pictures in their batches.
        """
        engine, before = self.engine, getattr(self.engine, "_is_gradient_accumulation_boundary", None)
        last = engine.is_gradient_accumulation_boundary() if boundary is None else boundary
        passes = _Passes(self, batch, loss, visual_weight, last, scale_wrt_gas)
        if self._begins:
            self._recorded = {}
            if not passes.pictures:
                _clear_gradients(self.trained)
        alpha = None if separate else self.rule.joint(self._weights, False)
        try:
            with passes.sparing():
                if alpha is not None or "visual" not in self.rule.needs(self._weights, False):
                    task_loss, visual_loss = passes.at_once(alpha)
                else:
                    task_loss, visual_loss = passes.one_at_a_time()
        except BaseException:
            self._forget()
            raise
        if visual_loss is not None:
            self._recorded["visual_loss"] = self.ranks.mean(visual_loss * passes.share)
        if last:
            self._forget()
        self._begins = last
        # A wish that was spoken for this micro-batch holds until the next, as accelerate's; the engine's own count too.
        engine.set_gradient_accumulation_boundary(before if boundary is None else boundary)
        return task_loss

    @property
    def diagnostics(self) -> dict[str, float]:
        """As of :attr:`MDGDOptimizer.diagnostics`; angles and lengths are of steps that took g and v apart."""
        values = {**self._recorded, **self.rule.diagnostics()}
        if self._products is not None:
            values |= gradient_diagnostics(self._products)
        return {name: float(value) for name, value in values.items()}

    def record(self, **values: Tensor) -> None:
        """Show these scalars in :attr:`diagnostics` too."""
        self._recorded.update({name: value.detach() for name, value in values.items()})

    # --------------------------------------------------------------------------------------------------------------
    # Checkpoints.

    @torch.no_grad()
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write φ and the rule's state to ``mdgd.safetensors``; beside ``engine.save_checkpoint(folder)``.

        All processes call it, and the first writes whole tensors, so that any stage and any number of processes can
        :meth:`load` them.

        Raises:
            ImportError: safetensors is not installed.
        """
        from safetensors.torch import save_file

        first = self.engine.global_rank == 0
        tensors = {}
        for i, name in enumerate(self.reference.names):
            # One after the other: no process holds more than one parameter whole, and the first copies it away.
            whole = self.reference.phi(i)
            if first:
                tensors[REFERENCE + name] = whole.to("cpu", copy=True).contiguous()
        for key, value in self.rule.state().items() if first else ():
            each = {"": value} if isinstance(value, Tensor) else dict(zip(self.reference.names, value, strict=True))
            for name, x in each.items():
                tensors[f"{RULE}{key}/{name}"] = x.to("cpu", copy=True).contiguous()
        if first:
            Path(folder).mkdir(parents=True, exist_ok=True)
            part = Path(folder, f"{FILE}.part")
            save_file(tensors, part, {"format": FORMAT, "rule": json.dumps(repr(self.rule))})
            part.replace(Path(folder, FILE))
        dist.barrier(group=self.engine.data_parallel_group)

    @torch.no_grad()
    def load(self, folder: str | os.PathLike[str]) -> None:
        """Load what :meth:`save` wrote: φ, and the rule's state; after ``engine.load_checkpoint(folder)``.

        Raises:
            FileNotFoundError: the folder holds no ``mdgd.safetensors``.
            ValueError: it is of another model, naming a parameter, or of another rule; nothing was changed.
            ImportError: safetensors is not installed.
        """
        from safetensors import safe_open

        path = Path(folder, FILE)
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: MDGDEngine.save writes it beside the engine's checkpoint")
        with safe_open(path, framework="pt", device="cpu") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"{path}: not written by MDGDEngine.save of this version")
            keys = set(file.keys())
            for name, p in zip(self.reference.names, self.trained, strict=True):
                if REFERENCE + name not in keys:
                    raise ValueError(f"{path}: holds no reference of {name}: it was saved from another model")
                shape = tuple(file.get_slice(REFERENCE + name).get_shape())
                if shape != _shape(p):
                    raise ValueError(f"{path}: the reference of {name} has shape {shape}, the parameter {_shape(p)}")
            state: dict[str, dict[str, Tensor]] = {}
            for key in keys:
                if key.startswith(RULE):
                    of, _, name = key.removeprefix(RULE).partition("/")
                    state.setdefault(of, {})[name] = file.get_tensor(key)
            found = {of: [x.get("", x.get(name)) for name in self.reference.names] for of, x in state.items()}
            self.rule.check_state(found, self.trained)
            for i, name in enumerate(self.reference.names):
                self.reference.set(i, file.get_tensor(REFERENCE + name))
        self.rule.load_state(found, self.trained)
        self._forget()

    # --------------------------------------------------------------------------------------------------------------
    # What one step is made of.

    def _forget(self) -> None:
        self._parts = {}
        self.rule.forget()

    def _finish_at_once(self) -> None:
        """Tell the rule of a step whose d was made by one backward pass."""
        lone = torch.full((len(self.trained), 1, 1), float("nan"), dtype=torch.float64, device="cpu")
        self.rule.coefficients(lone, self._weights, False)
        self._products = None

    def _anchors(self) -> list[Anchor]:
        """The anchors whose pull comes at this step, which they count."""
        found: Any = self.rule
        anchors = []
        while isinstance(found, Around):
            if isinstance(found, Anchor):
                anchors.append(found)
            found = found.rule
        return [anchor for anchor in anchors if anchor.begin_pull(self.trained)]

    @contextmanager
    def _taking(self, kind: str) -> Iterator[None]:
        """A backward pass inside leaves its gradients here, and zeros to the engine."""
        parts = self._parts.setdefault(kind, [None] * len(self.trained))

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
        return _padded(whole, size * world)[size * rank :][:size].clone()

    @torch.no_grad()
    def _combine(self) -> None:
        """Put d of what was taken where the engine looks for gradients."""
        missing = [None] * len(self.trained)
        g, v, g0, v0 = (self._parts.get(kind, list(missing)) for kind in KINDS)
        if any(x is not None for x in g0):
            along = self._sums([g0, v0])
            b = self.rule.drift(along)
            kernels.combine_(g0, [g0, v0], torch.stack([torch.ones_like(b), -b], dim=1))
        gradients = [g, v, g0]
        while len(gradients) > 1 and all(x is None for x in gradients[-1]):
            gradients.pop()
        products = self._sums(gradients)
        self._products = products
        for anchor in self._anchors():
            for layer in anchor.layers:
                for i, x in anchor.pull_of(layer, self.reference.theta, self.reference.phi, self._scale()).items():
                    own = g[i]
                    if own is not None:
                        own += self._part(x.float())
        w = {name: x.to(products.device) for name, x in self._weights.items()}
        coefficients = self.rule.coefficients(products, w, False)
        d = [next((x for x in xs if x is not None), None) for xs in zip(*gradients, strict=True)]
        kernels.combine_(d, gradients, coefficients)
        for p, part in zip(self.trained, d, strict=True):
            if part is not None:
                whole = _all_parts(part, self.engine.data_parallel_group)
                _set_gradient(p, whole[: torch.Size(_shape(p)).numel()].view(_shape(p)))

    def _sums(self, gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """Inner products of whole gradients, from their parts."""
        with exact({p.device for p in self.trained}):
            products = kernels.inner_products(gradients)
        dist.all_reduce(products, group=self.engine.data_parallel_group)
        return products

    def _scale(self) -> float:
        """The loss scale of float16 training, 1 otherwise."""
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0))


class _Passes:
    """The forward and backward passes over one micro-batch."""

    def __init__(
        self,
        mdgd: MDGDEngine,
        batch: Batch,
        loss: Callable[[Batch], Tensor] | None,
        visual_weight: float,
        last: bool,
        scale_wrt_gas: bool,
    ) -> None:
        self.mdgd, self.batch, self.loss, self.last, self.scale_wrt_gas = mdgd, batch, loss, last, scale_wrt_gas
        self.engine, self.rule, self.tap = mdgd.engine, mdgd.rule, mdgd.tap
        self.images = image_tokens(self.tap, batch)
        _require_alike(batch, mdgd.ranks, self.images.device)
        self.pictures, self.share = mdgd.ranks.share(self.images.sum())
        self.visual_weight = visual_weight * self.share
        self.traces = Traces(self.engine.module)

    def sparing(self) -> Any:
        """No frozen part runs twice inside, where parameters are not partitioned."""
        partitioned = any(map(_is_partitioned, self.mdgd.trained))
        return nullcontext() if partitioned else reuse_frozen_parts(self.engine.module, self.mdgd.trained)

    def at_once(self, alpha: float | None) -> tuple[Tensor, Tensor | None]:
        """Task loss and L_v, from one backward pass of L + αL_v, or of L."""
        z_reference, visual_loss = None, None
        if self.pictures and alpha is not None:
            with self.mdgd.reference():
                z_reference = self.features()
        with ExitStack() as stack:
            pulls = stack.enter_context(_Pulls(self.mdgd)) if self.last else None
            with self.rule.observe(self.images, self.batch):
                task_loss, z = self.forward()
            total: Any = task_loss
            if z_reference is not None and alpha is not None:
                z_reference = self.comparable(z, z_reference)
                self.rule.saw_features(z, z_reference, self.mdgd.ranks.mean)
                visual_loss = visual_alignment_loss(z, z_reference, self.mdgd.alignment)
                total = total + visual_loss * (alpha * self.visual_weight)
            if pulls is not None:
                pulls.begin()
                micro_batches = self.engine.gradient_accumulation_steps() if self.scale_wrt_gas else 1
                total = _Scale.apply(total, pulls, micro_batches)  # type: ignore[no-untyped-call]
            if alpha is not None and visual_loss is None:
                visual_loss = torch.zeros_like(task_loss, dtype=torch.float32)
            self.backward(total, self.last)
        if pulls is not None:
            pulls.finish()
            self.mdgd._finish_at_once()
        return task_loss.detach(), None if visual_loss is None else visual_loss.detach()

    def one_at_a_time(self) -> tuple[Tensor, Tensor]:
        """Task loss and L_v, from a forward and a backward pass for each gradient."""
        seen = self.pictures or any(x is not None for x in self.mdgd._parts.get("visual", ()))
        w = self.mdgd._weights
        needs = self.rule.needs(w, False) if seen or not self.last else KINDS[:1]
        z_reference, visual_loss = None, None
        if needs == KINDS:
            z = self.features() if self.pictures else None
            with self.mdgd.reference():
                if z is not None:
                    z_reference = self.visual("reference_visual", z)[1]
                with self.traces.aside():
                    self.take("reference_task", self.forward()[0])
        elif self.pictures:
            with self.mdgd.reference():
                z_reference = self.features()
        if needs == KINDS[:1]:
            # Of earlier micro-batches, which could not know that no picture would follow.
            for kind in KINDS[2:]:
                self.mdgd._parts.pop(kind, None)
        if z_reference is not None:
            visual_loss = self.visual("visual", z_reference)[0]
        with self.rule.observe(self.images, self.batch):
            task_loss, _ = self.forward()
        self.take("task", task_loss, self.last)
        if self.last:
            self.mdgd._combine()
        return task_loss.detach(), torch.zeros_like(task_loss).float() if visual_loss is None else visual_loss

    def visual(self, kind: str, z_fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Take the gradient of L_v; returns L_v and z, without a graph."""
        with self.traces.aside():
            task_loss, z = self.forward()
            z_fixed = self.comparable(z, z_fixed)
            if kind == "visual":
                self.rule.saw_features(z, z_fixed, self.mdgd.ranks.mean)
            visual_loss = visual_alignment_loss(z, z_fixed, self.mdgd.alignment)
            # The engine looks for the beginning of a backward pass where the model's output is.
            self.take(kind, visual_loss * self.visual_weight + 0 * task_loss)
        return visual_loss.detach(), z.detach()

    def take(self, kind: str, loss: Tensor, last: bool = False) -> None:
        with self.mdgd._taking(kind):
            self.backward(loss, last)

    def backward(self, loss: Tensor, last: bool) -> None:
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
        return self.engine(**inputs) if self.loss is None else self.loss(inputs)

    def comparable(self, z: Tensor, z_fixed: Tensor) -> Tensor:
        """What z is compared with, so that no rounding is taken for drift."""

        def anywhere(here: bool) -> bool:
            return bool(self.mdgd.ranks.mean(torch.tensor(float(here), dtype=torch.float32, device=z.device)) > 0)

        return without_noise(
            z, z_fixed, self.features, self.tap.text_module, unmoved=self.mdgd.reference.is_there, anywhere=anywhere
        )


class _Pulls:
    """The anchor's pull in a backward pass: of each layer in its own, where ZeRO-3 has gathered its weights."""

    def __init__(self, mdgd: MDGDEngine) -> None:
        self.mdgd = mdgd
        self.due: list[Anchor] = []
        # What the pass's loss is multiplied with, once it has begun.
        self.scale: Tensor | None = None
        self.micro_batches = 1
        # The places of parameters that were pulled.
        self.done: set[int] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> "_Pulls":
        found: Any = self.mdgd.rule
        while isinstance(found, Around):
            if isinstance(found, Anchor):
                for layer in found.layers:
                    self._handles += [self._hook(found, layer, *one) for one in _owners(layer)]
            found = found.rule
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """The forward pass has ended: take in what it brought to the layers."""
        self.due = self.mdgd._anchors()

    def finish(self) -> None:
        """The backward pass has ended: pull the layers that it did not go through, and an earlier micro-batch did."""
        from deepspeed.utils import safe_get_full_grad

        for anchor in self.due:
            for layer in anchor.layers:
                places = [i for i in layer.places if i not in self.done]
                gradients = {i: safe_get_full_grad(self.mdgd.trained[i]) for i in places}
                if any(x is not None and bool(x.any()) for x in gradients.values()):
                    found = self._of(anchor, layer)
                    for i, x in gradients.items():
                        if x is not None:
                            _set_gradient(self.mdgd.trained[i], x + found[i].to(x.dtype))

    def _of(self, anchor: Anchor, layer: Linear) -> dict[int, Tensor]:
        assert self.scale is not None
        reference, scale = self.mdgd.reference, float(self.scale) * self.micro_batches
        return anchor.pull_of(layer, reference.theta, reference.phi, scale)

    def _hook(self, anchor: Anchor, layer: Linear, module: nn.Module, places: list[int]) -> Any:
        def pull() -> list[Tensor | None]:
            # A layer that is run several times is pulled once.
            if not self.done.isdisjoint(places) or not any(anchor is one for one in self.due):
                return [None] * len(places)
            self.done |= set(places)
            found = self._of(anchor, layer)
            return [found[i].to(self.mdgd.trained[i].dtype) for i in places]

        def call(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            parameters = [self.mdgd.trained[i] for i in places]
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


class _Scale(torch.autograd.Function):
    """A loss as it is, and what the engine multiplies it with."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, pulls: _Pulls, micro_batches: int) -> Tensor:
        ctx.pulls = pulls
        pulls.micro_batches = micro_batches
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.pulls.scale = grad
        return grad, None, None


# What ZeRO-3 does to a parameter: ``ds_tensor`` is this process's part of it, padded to as much as the others' have.


def _is_partitioned(p: Tensor) -> bool:
    return hasattr(p, "ds_id")


def _held(p: Any) -> Tensor:
    """What this process holds of a parameter."""
    held: Tensor = p.ds_tensor if _is_partitioned(p) else p
    return held.detach()


def _shape(p: Any) -> tuple[int, ...]:
    return tuple(p.ds_shape if _is_partitioned(p) else p.shape)


def _gather(p: Any, part: Tensor) -> Tensor:
    """A whole tensor from parts that are divided as the parameter."""
    whole = _all_parts(part.reshape(-1).to(p.device), p.ds_process_group)
    return whole[: p.ds_numel].view(p.ds_shape)


def _all_parts(part: Tensor, group: Any) -> Tensor:
    whole = part.new_empty(part.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _padded(whole: Tensor, size: int) -> Tensor:
    return nn.functional.pad(whole.reshape(-1), (0, size - whole.numel()))


def _release(engine: Any) -> None:
    """Drop what ZeRO-3 has gathered, and wait for what it is gathering."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.empty_partition_cache()


def _set_gradient(p: Any, whole: Tensor) -> None:
    from deepspeed.utils import safe_set_full_grad

    if _is_partitioned(p):
        # It looks for each process's part where that would be with the padding.
        whole = _padded(whole, p.ds_tensor.numel() * dist.get_world_size(p.ds_process_group))
    safe_set_full_grad(p, whole)


@torch.no_grad()
def _clear_gradients(parameters: Sequence[Tensor]) -> None:
    """ZeRO-3 steps with the last step's gradient of a parameter that this step does not use."""
    from deepspeed.utils import safe_set_local_grad

    for p in filter(_is_partitioned, parameters):
        safe_set_local_grad(p, torch.zeros_like(_held(p)).view(-1))


def _require_alike(batch: Batch, ranks: Ranks, device: torch.device) -> None:
    """Raise a RuntimeError if some processes' batches have pictures and others' have none."""
    here = any(isinstance(batch.get(name), Tensor) and batch[name].numel() > 0 for name in PICTURES)
    mean = float(ranks.mean(torch.tensor(float(here), dtype=torch.float32, device=device)))
    if 0 < mean < 1:
        raise RuntimeError(
            "MDGDEngine: some processes' batches have pictures and others' have none. DeepSpeed reduces gradients in "
            "the order of the modules that ran, which has to be the same everywhere: draw batches so that all of them "
            "have pictures or none, or give text a blank picture that no token stands for"
        )


def _refuse_engine(engine: Any) -> None:
    if not hasattr(engine, "zero_optimization_stage") or not hasattr(engine, "module"):
        raise TypeError(f"MDGDEngine takes the engine of deepspeed.initialize, not {type(engine).__name__}")
    if engine.zero_optimization_stage() not in (1, 2, 3):
        raise ValueError(
            "MDGDEngine: the engine has no ZeRO: use stage 1, 2 or 3, or DistributedDataParallel with MDGDOptimizer"
        )
    partitioned = [p for p in engine.module.parameters() if p.requires_grad and _is_partitioned(p)]
    config = engine.config.get("zero_optimization", {})
    found = {
        "parameters offloaded to NVMe": (config.get("offload_param") or {}).get("device") == "nvme",
        "zero_hpz_partition_size above 1": int(config.get("zero_hpz_partition_size") or 1) > 1,
        "zero_quantized_weights": bool(config.get("zero_quantized_weights")),
        "mics_shard_size": int(config.get("mics_shard_size") or -1) > 0,
    }
    for name, present in found.items():
        if present and partitioned:
            raise ValueError(
                f"MDGDEngine does not support {name}, which holds parameters in other places too, where φ would be "
                f"missed: leave it out, or {FSDP2}"
            )


def _refuse_rule(rule: Any) -> None:
    if not isinstance(rule, Rule):
        raise TypeError(f"MDGDEngine: rule must be a Rule such as MDGD(), or None, got {rule!r}")
    if rule.corrects:
        raise ValueError(
            f"MDGDEngine does not support {rule}, which corrects parameters after the optimizer's step: DeepSpeed's "
            f"step is in partitions of flat float32 copies. Use MDGD, Project, Anchor or DriftBudget, or {FSDP2}"
        )
    found: Any = rule
    while True:
        if type(found).pull_ not in (Rule.pull_, Around.pull_, Anchor.pull_):
            raise ValueError(f"MDGDEngine does not support {found}, whose pull_ needs all parameters at once: {FSDP2}")
        if not isinstance(found, Around):
            return
        found = found.rule


def _refuse_groups(engine: Any) -> None:
    for group in engine.optimizer.param_groups:
        own = [key for key in group if isinstance(key, str) and key.startswith(PREFIX)]
        if own:
            raise ValueError(
                f"MDGDEngine: a parameter group has {own[0]!r}, and the rule's weights are the same for all parameters "
                f"here: leave it out, or {FSDP2}"
            )

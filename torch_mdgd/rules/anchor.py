"""The anchor: a layer's answers to the inputs that it gets from prompts stay where they were.

A linear layer answers x with Wx. The anchor penalises how far its answers move, E ‖(W − W₀) x‖², over the inputs x that
prompts bring to it at the reference φ: image tokens and question tokens, but no answers.

    C = mean of x xᵀ over prompt tokens at φ, divided by the mean of ‖y‖² of the layer's answers y there
        (x ends in 1 for a trained bias), so that λ weighs relative changes; or divided by the mean of its diagonal
    d = g + λ (W − W₀) C                                  the gradient of λ/2 tr((W − W₀) C (W − W₀)ᵀ) added to g
    LoRA: W − W₀ = s (BA − B₀A₀), and the chain rule for A and B

It needs no visual gradient and no pass at φ: one forward and one backward pass. It is ours, not the paper's. Relatives:
L2-SP is C = I; EWC is diagonal and on the side of outputs; the Kronecker-factored Laplace approximation (Ritter et al.
2018) has an output factor besides, and tokens of all kinds; LaLoRA (arXiv 2512.17720) is a Laplace approximation of the
adapters' own weights; Adam-NSCL (CVPR 2021) and GPM (ICLR 2021) project on the null space of C.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_mdgd.checks import first_of, require_number, require_whole
from torch_mdgd.kernels import Tensors
from torch_mdgd.kernels.exact import exact
from torch_mdgd.models.linear import (
    Linear,
    attended_tokens,
    prompt_tokens,
    rows,
    trained_linear_layers,
    uncovered,
    watching,
)
from torch_mdgd.parallel import dtensor
from torch_mdgd.rules.around import Around, Plain
from torch_mdgd.rules.base import Rule, Weights, as_count, lone, nothing, require_shapes
from torch_mdgd.rules.moments import Covariance, Moments

SUMS, SIZE, SEEN, STEPS = "anchor_sums", "anchor_size", "anchor_seen", "anchor_steps"


class Anchor(Around):
    """d = g + λ (W − W₀) C for each trained linear layer; for LoRA the same of W − W₀ = s (BA − B₀A₀).

    C is made of what prompts bring to each layer at φ: by :meth:`calibrate` before training, with pictures of the task
    and general questions, or else from the first steps' own prompts. Layers that share an input share the work.

    What is held: for each distinct input 2 · rank rows of its width, in float32. For the last six layers of a 7 B LLaVA
    (widths 4096 and 11008) with rank 8 that is 9 MB, for LoRA on all its 32 layers 48 MB; a step reads each trained
    weight once more, and LoRA's matrices alone. Norms, embeddings, convolutions and fused experts are not held: a
    warning names them once, and another the linear layers that no prompt has reached when C is made.

    Args:
        model: whose layers are trained; also inside DistributedDataParallel or a PeftModel.
        strength: λ ≥ 0: a larger one keeps more and learns less. ``python -m reproductions mini strength`` measures it:
            on a small LLaVA 3 to 10 lie within two points of H, the mean of kept and learned, of each other, for two
            tasks, full fine-tuning and LoRA, AdamW and clipped SGD.
        rank: how many directions of each input are held exactly, beside an isotropic rest; None for the whole C, the
            square of each width.
        tokens: what C is made of in the text decoder: "prompt" (image and question tokens), "image", or "all". Other
            layers, as the connector's, count all that enters them.
        warmup: from how many steps C is made where :meth:`calibrate` was not called.
        every: k ≥ 1: the pull comes at one step of k, k-fold.
        relative: whether λ is relative to the size of each layer's answers; else C is divided by the mean of its own
            diagonal, and λ has to be found for each model, about a hundredth.
        rule: what is done besides, such as ``MDGD(align, regularize=0)``; nothing if None.
        parts: of the model, to hold their layers alone; all layers if empty.
        text_module: the decoder; that of a model of transformers if None.

    Raises:
        ValueError: an argument is out of range, naming it; a DoRA layer.
        TypeError: no ``text_module``, and not a model of transformers; ``rule`` is no rule.
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float = 5.0,
        *,
        rank: int | None = 8,
        tokens: Literal["prompt", "image", "all"] = "prompt",
        warmup: int = 8,
        every: int = 1,
        relative: bool = True,
        rule: Rule | None = None,
        parts: Sequence[nn.Module] = (),
        text_module: nn.Module | None = None,
    ) -> None:
        strength = require_number("Anchor: strength", strength, least=0)
        super().__init__(Plain() if rule is None else rule, {"strength": strength})
        if tokens not in ("prompt", "image", "all"):
            raise ValueError(f"Anchor: tokens must be 'prompt', 'image' or 'all', got {tokens!r}")
        self.rank = None if rank is None else require_whole("Anchor: rank", rank)
        self.tokens = tokens
        self.warmup, self.every = require_whole("Anchor: warmup", warmup), require_whole("Anchor: every", every)
        self.relative = relative
        self._model, self._parts, self._text = model, list(parts), text_module
        self.layers: list[Linear] = []
        self._count = 0
        # By a layer's key: the moments of all earlier inputs, those of the step under way, and C.
        self.moments: dict[int, Moments] = {}
        self._new: dict[int, Moments] = {}
        self._empties: dict[Any, Moments] = {}
        # By a layer's key: Σ ‖y‖² of its answers and their number; of earlier inputs, and of the step under way.
        self.answers: dict[int, Tensor] = {}
        self._new_answers: dict[int, Tensor] = {}
        self._covariances: dict[int, Covariance] = {}
        self._groups: Sequence[Any] = ()
        self._agreed = False
        # From how many steps C is made so far; how many steps were combined.
        self.seen = self.steps = 0
        self._places: dict[Any, int] = {}
        self._phi: list[Tensor] = []
        self._pending: tuple[Any, ...] | None = None

    def __repr__(self) -> str:
        inner = "" if isinstance(self.rule, Plain) else f", rule={self.rule}"
        return f"Anchor({self.weights['strength']:g}, rank={self.rank}{inner})"

    def __getstate__(self) -> dict[str, Any]:
        # A process group belongs to its process.
        return {**vars(self), "_groups": (), "_agreed": False, "_new": {}, "_new_answers": {}}

    # --------------------------------------------------------------------------------------------------------------
    # Which layers.

    def attach(self, parameters: Sequence[Tensor], masked: bool) -> None:
        """Find the layers among the parameters of an optimizer.

        Raises:
            ValueError: there are none, or it belongs to another optimizer already.
        """
        super().attach(parameters, masked)
        self._find(parameters)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.calibrate(*pending)

    def extend(self, parameters: Sequence[Tensor]) -> None:
        """Look for layers whose weights are in a new group."""
        super().extend(parameters)
        self._find(parameters)

    def _find(self, parameters: Sequence[Tensor]) -> None:
        places = {p: self._count + i for i, p in enumerate(parameters)}
        self._count += len(places)
        found = trained_linear_layers(self._model, places, self._text, self._parts)
        left = uncovered(self._model, places, found)
        found = self._without_second_matrices(found)
        for layer in found:
            held = [parameters[i - self._count + len(places)] for i in (layer.weight, layer.bias) if i is not None]
            if any(p.is_shard() and p.dim for x in held for p in getattr(x, "placements", ())):
                raise ValueError(f"Anchor: {layer.name} is not sharded by rows, along its first dimension")
            like = parameters[layer.key - self._count + len(places)]
            self.moments[layer.key] = self._empty(layer.width, dtensor.local([like])[0])
            self.answers[layer.key] = torch.zeros(2, dtype=torch.float64, device=like.device)
        self.layers += found
        if not self.layers:
            raise ValueError("Anchor: the optimizer holds no linear layer of the model, plain or LoRA's")
        if left and not self._parts:
            warnings.warn(f"Anchor holds linear layers; these are trained freely: {first_of(left)}", stacklevel=4)

    def _without_second_matrices(self, found: Sequence[Linear]) -> list[Linear]:
        """The new layers. A LoRA matrix whose other one came in an earlier group joins it: their pull is of BA."""
        held = {(layer.module, layer.adapter): layer for layer in self.layers if layer.lora is not None}
        new = []
        for layer in found:
            first = held.get((layer.module, layer.adapter))
            if first is None or first.lora is None or layer.lora is None:
                new.append(layer)
            else:
                (a, b), (other_a, other_b) = first.lora, layer.lora
                first.lora = other_a if a is None else a, other_b if b is None else b
        return new

    def _empty(self, width: int, like: Tensor) -> Moments:
        """Of no inputs: one for all layers of a kind, so that those which share an input go on sharing its moments."""
        kind = width, like.dtype, like.device
        return self._empties.setdefault(kind, Moments.empty(width, self.rank, like))

    def _on(self, device: torch.device, key: int) -> Moments:
        """A layer's moments, where the layer now is."""
        held = self.moments[key]
        if held.sums.device != device:
            moved = held.to(device)
            # Layers that share an input go on sharing its moments.
            shared = [other for other, moments in self.moments.items() if moments is held]
            self.moments |= dict.fromkeys(shared, moved)
            self.answers |= {other: self.answers[other].to(device) for other in shared}
            self._covariances = {}
        return self.moments[key]

    # --------------------------------------------------------------------------------------------------------------
    # What enters them.

    @contextmanager
    def observe(self, images: Tensor, batch: Mapping[str, Any] | None = None) -> Iterator[None]:
        """A forward pass inside tells of its inputs, while C is being made; micro-batches add up.

        Raises:
            ValueError: a layer of the decoder sees another sequence than that of the batch; no ``input_ids``.
        """
        with ExitStack() as stack:
            stack.enter_context(super().observe(images, batch))
            if self.seen < self.warmup:
                stack.enter_context(self._watching(images, batch))
            yield

    @contextmanager
    def _watching(self, images: Tensor, batch: Mapping[str, Any] | None) -> Iterator[None]:
        if self.tokens == "image":
            mask = images
        else:
            mask = prompt_tokens(batch) if self.tokens == "prompt" else attended_tokens(batch)
        last: list[Any] = []

        def see(layer: Linear, x: Tensor, y: Tensor) -> None:
            kind, key = (layer.in_text, layer.width, x._version), layer.key
            chosen = rows(x, mask, layer, batch)
            with torch.no_grad(), exact([x.device]):
                # That of q, k and v is one, and of a gate and what it multiplies.
                like = self._on(x.device, key).sums
                if not last or last[0] is not x or last[1] != kind:
                    last[:] = x, kind, Moments.of(_flat(x, chosen), layer.width, self.rank, like)
                answers = _flat(y, chosen).double()
                size = torch.stack([answers.square().sum(), answers.new_tensor(float(len(answers)))])
                self._new[key] = self._new[key].plus([last[2]]) if key in self._new else last[2]
                self._new_answers[key] = self._new_answers.get(key, torch.zeros_like(size)) + size

        try:
            with watching(self.layers, see):
                yield
        except BaseException:
            self._new, self._new_answers = {}, {}
            raise

    @torch.no_grad()
    def calibrate(
        self,
        batches: Iterable[Mapping[str, Any]],
        images: Callable[[Mapping[str, Any]], Tensor] | None = None,
        group: Any = None,
    ) -> "Anchor":
        """Make C from what these batches bring to the layers at φ, in place of the first steps.

        Call it before training: now, or as soon as the optimizer is built, the batches are run without gradients. No
        labels are needed: all tokens are then prompts.

        Args:
            batches: what the model is called with: pictures of the task under general questions, such as
                :func:`torch_mdgd.prompts.question_batches` makes, or the task's own batches. A few hundred prompts do.
            images: marks image tokens, for ``tokens="image"``.
            group: processes that each have batches of their own, as many on each; without it, all processes have the
                same batches.

        Returns:
            this rule.

        Raises:
            ValueError: no batch.
        """
        if not self.layers:
            # Which layers are trained is known when the optimizer is built.
            self._pending = batches, images, group
            return self
        training = [m for m in self._model.modules() if m.training]
        before = dict(self.moments), dict(self.answers)
        self._model.eval()
        try:
            for key, empty in self.moments.items():
                self.moments[key] = self._empty(empty.sums.shape[1], empty.sums)
                self.answers[key] = torch.zeros_like(self.answers[key])
            self._new, self._new_answers, count = {}, {}, 0
            for batch in batches:
                mask = torch.zeros(1, dtype=torch.bool, device="cpu") if images is None else images(batch)
                with self._watching(mask, batch):
                    self._model(**{name: x for name, x in batch.items() if name != "labels"})
                self._take_in([group] if group is not None else [])
                count += 1
            if not count:
                raise ValueError("Anchor.calibrate: batches is empty")
        except BaseException:
            (self.moments, self.answers), self._covariances = before, {}
            raise
        finally:
            for module in training:
                module.training = True
        self.seen = self.warmup
        self._warn_of_idle()
        return self

    def sum_over(self, groups: Sequence[Any]) -> None:
        """From now on, inputs are those of the processes of these groups; ``mdgd_backward`` says so itself."""
        super().sum_over(groups)
        self._groups = groups

    def forget(self) -> None:
        """Forget the inputs of the step under way."""
        super().forget()
        self._new, self._new_answers = {}, {}

    def _take_in(self, groups: Sequence[Any]) -> None:
        """Add the new inputs of all processes to the moments."""
        merged: dict[tuple[int, ...], Moments] = {}
        gathered: dict[int, list[Moments]] = {}
        for key, held in self.moments.items():
            new = self._new.get(key)
            if new is None and not groups:
                continue
            new = new or self._empty(held.sums.shape[1], held.sums)
            if id(new) not in gathered or groups:
                others = [new]
                for group in groups:
                    others = [part for other in others for part in other.gathered(group)]
                gathered[id(new)] = others
            pair = id(held), id(new)
            if pair not in merged:
                merged[pair] = held.plus(gathered[id(new)])
            self.moments[key] = merged[pair]
            answers = self._new_answers.get(key, torch.zeros_like(self.answers[key]))
            for group in groups:
                torch.distributed.all_reduce(answers, group=group)
            if bool(answers.isfinite().all()):
                self.answers[key] = self.answers[key] + answers
        self._new, self._new_answers, self._covariances = {}, {}, {}

    def _warn_of_idle(self) -> None:
        """Name the layers that C is zero of, once it is made: those that hold what other modules take from them."""
        answered = torch.stack([self.answers[layer.key][1].cpu() for layer in self.layers]).tolist()
        idle = [layer.name for layer, count in zip(self.layers, answered, strict=True) if not count]
        if idle:
            warnings.warn(
                "Anchor: no pass of those that C is made of has run these layers as modules, or at no token that "
                f"counts, so they are trained freely: {first_of(idle)}",
                stacklevel=4,
            )

    def _require_agreement(self) -> None:
        """Processes that hold different C would pull apart what they keep equal otherwise."""
        found = [torch.cat([held.size, self.answers[key]]) for key, held in self.moments.items()]
        sizes = torch.stack([x.to(found[0].device) for x in found])
        least, most = sizes.clone(), sizes.clone()
        for group in self._groups:
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group)
        if not torch.allclose(least, most, rtol=1e-3, atol=0):
            raise RuntimeError(
                "Anchor: each process was calibrated with batches of its own, so that they would pull differently: "
                "call calibrate(batches, group=torch.distributed.group.WORLD), or give all of them the same batches"
            )
        self._agreed = True

    def _covariance(self, layer: Linear) -> Covariance:
        if layer.key not in self._covariances:
            total, count = self.answers[layer.key]
            size = total / count.clamp(min=1) if self.relative else None
            self._covariances[layer.key] = self.moments[layer.key].covariance(size)
        return self._covariances[layer.key]

    # --------------------------------------------------------------------------------------------------------------
    # The pull.

    def pull_(
        self,
        g: Tensors,
        parameters: Sequence[Tensor],
        difference: Callable[[int], Tensor],
        w: Weights,
        scale: float,
    ) -> None:
        """Add λ (W − W₀) C to the gradients of the task."""
        super().pull_(g, parameters, difference, w, scale)
        if not self.begin_pull(parameters):
            return
        strength = (w["strength"] * (scale * self.every)).tolist()
        here: list[Any] = dtensor.local(g)
        for layer in self.layers:
            pull = strength[layer.key]
            if pull and layer.lora is None:
                self._pull_plain_(layer, here, difference, pull)
            elif pull:
                self._pull_lora_(layer, g, parameters, difference, pull)

    def begin_pull(self, parameters: Sequence[Tensor]) -> bool:
        """Take in what the passes of this step brought to the layers, and count the step.

        Args:
            parameters: T parameters, of which only the devices are read.

        Returns:
            whether the pull comes at this step.

        Raises:
            RuntimeError: processes were calibrated with different batches.
        """
        for layer in self.layers:
            self._on(parameters[layer.key].device, layer.key)
        if self.seen < self.warmup and (self._new or self._groups):
            self._take_in(self._groups)
            self.seen += 1
            if self.seen == self.warmup:
                self._warn_of_idle()
        if self._groups and not self._agreed:
            self._require_agreement()
        self.steps += 1
        return self.steps % self.every == 0

    @torch.no_grad()
    def pull_of(
        self, layer: Linear, theta: Callable[[int], Tensor], phi: Callable[[int], Tensor], scale: float
    ) -> dict[int, Tensor]:
        """The pull of one layer by itself, for engines that hold parameters and gradients in partitions.

        Args:
            layer: of :attr:`layers`.
            theta: the whole value of parameter t at θ.
            phi: that at φ.
            scale: the loss scale that gradients carry.

        Returns:
            what :meth:`pull_` adds to the gradients of the layer's parameters, by their places.
        """
        values = {i: theta(i) for i in layer.places}
        dtype = self.moments[layer.key].sums.dtype
        out = {i: torch.zeros_like(x, dtype=dtype) for i, x in values.items()}

        def difference(i: int) -> Tensor:
            return values[i] - phi(i)

        pull = self.weights["strength"] * scale * self.every
        with exact({x.device for x in values.values()}):
            if layer.lora is None:
                self._pull_plain_(layer, out, difference, pull)
            else:
                self._pull_lora_(layer, out, values, difference, pull)
        return out

    def _pull_plain_(self, layer: Linear, g: Any, difference: Callable[[int], Tensor], pull: float) -> None:
        c = self._covariance(layer)
        width = c.matrix.shape[1] - (layer.bias is not None)
        weight = layer.weight if layer.weight is not None and g[layer.weight] is not None else None
        bias = layer.bias if layer.bias is not None and g[layer.bias] is not None else None
        if weight is None and bias is None:
            return
        dtype = c.matrix.dtype
        db = None if layer.bias is None or bias is None else difference(bias).to(dtype)[:, None]
        if weight is not None:
            dw = difference(weight).to(dtype)
        else:
            assert db is not None
            dw = db.new_zeros(len(db), width)
        parts = [dw] if layer.bias is None else [dw, dw.new_zeros(len(dw), 1) if db is None else db]
        out = [None if weight is None else g[weight], None if bias is None else g[bias][:, None]]
        c.add_(out[: len(parts)], parts, pull)

    def _pull_lora_(
        self,
        layer: Linear,
        g: Any,
        parameters: Any,
        difference: Callable[[int], Tensor],
        pull: float,
    ) -> None:
        def at_both(i: int) -> tuple[Tensor, Tensor]:
            value = dtensor.whole(parameters[i].detach())
            return value, value - dtensor.whole(dtensor.as_shard(difference(i), parameters[i]))

        c = self._covariance(layer)
        a, b = layer.lora or (None, None)
        (A, A0), (B, B0) = self._matrices(layer, at_both)
        # BA − B₀A₀ as one product, so that few small ones are made.
        left, right = torch.cat([B, -B0], dim=1), c.after([torch.cat([A, A0])])[0]
        factor = pull * layer.scaling**2
        if a is not None and g[a] is not None:
            _add_(g[a], (B.T @ left) @ right, factor)
        if b is not None and g[b] is not None:
            _add_(g[b], left @ (right @ A.T), factor)

    def _matrices(self, layer: Linear, at_both: Callable[[int], tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """A and B, each at θ and at φ: from its place if it is trained, else from the module."""
        dtype, modules = self.moments[layer.key].sums.dtype, (layer.module.lora_A, layer.module.lora_B)
        out = []
        for i, matrices in zip(layer.lora or (), modules, strict=True):
            fixed: Any = matrices
            now, then = (dtensor.whole(fixed[layer.adapter].weight.detach()),) * 2 if i is None else at_both(i)
            out.append((now.to(dtype), then.to(dtype)))
        return out

    # --------------------------------------------------------------------------------------------------------------
    # As a plain loss.

    def hold(self, parameters: Iterable[Tensor] | None = None) -> "Anchor":
        """Find the layers and keep φ, for :meth:`loss`, without an optimizer.

        Args:
            parameters: those that are trained; all of the model that require gradients if None.

        Returns:
            this rule, to be calibrated.

        Raises:
            ValueError: parameters are sharded by ``fully_shard``.
        """
        found = list(self._model.parameters() if parameters is None else parameters)
        trained = [p for p in found if p.requires_grad]
        dtensor.refuse_sharded("Anchor.hold", trained, "give the rule to an MDGDOptimizer, and call mdgd_backward")
        self.attach(trained, masked=False)
        # LoRA whose B is zero is nothing at φ, whatever A is: no copy.
        pairs = [layer.lora for layer in self.layers if layer.lora is not None and _is_nothing(layer)]
        live, zero = ({pair[k] for pair in pairs} for k in (0, 1))
        self._phi = [
            p.detach() if i in live else p.new_zeros(()).expand_as(p) if i in zero else p.detach().clone()
            for i, p in enumerate(trained)
        ]
        self._places = {p: i for i, p in enumerate(trained)}
        return self

    def loss(self) -> Tensor:
        """λ/2 Σ tr((W − W₀) C (W − W₀)ᵀ) over all layers, with its graph; float32 scalar.

        Its gradient is what an optimizer with this rule adds to the task's. Add it to the loss of a Trainer, or of an
        engine that hides gradients, after :meth:`hold` and :meth:`calibrate`.

        Raises:
            RuntimeError: :meth:`hold` was not called.
        """
        if not self._phi:
            raise RuntimeError("Anchor.loss: call anchor.hold() before training, when the weights are the reference")
        theta: list[Any] = list(self._places)
        for layer in self.layers:
            self._on(theta[layer.key].device, layer.key)
        self._phi = [x.to(p.device) for x, p in zip(self._phi, theta, strict=True)]
        with exact({p.device for p in theta}):
            terms = [self._energy(layer, theta) for layer in self.layers]
        total = torch.stack([x.float().to(terms[0].device) for x in terms]).sum()
        return total * (self.weights["strength"] / 2)

    def _energy(self, layer: Linear, theta: Sequence[Tensor]) -> Tensor:
        """tr(D C Dᵀ)."""
        c = self._covariance(layer)
        if layer.lora is None:
            deltas = [theta[i] - self._phi[i] for i in (layer.weight, layer.bias) if i is not None]
            parts = [x.to(c.matrix.dtype) if x.dim() == 2 else x.to(c.matrix.dtype)[:, None] for x in deltas]
            if layer.weight is None:
                parts = [parts[0].new_zeros(len(parts[0]), c.matrix.shape[1] - 1), *parts]
            return torch.stack([(x * y).sum() for x, y in zip(parts, c.after(parts), strict=True)]).sum()
        (A, A0), (B, B0) = self._matrices(layer, lambda i: (theta[i], self._phi[i]))
        AC, A0C = c.after([A])[0], c.after([A0])[0]
        both = ((B.T @ B) * (AC @ A.T)).sum() - 2 * ((B.T @ B0) * (A @ A0C.T)).sum()
        out: Tensor = (both + ((B0.T @ B0) * (A0C @ A0.T)).sum()) * layer.scaling**2
        return out

    # --------------------------------------------------------------------------------------------------------------
    # Checkpoints.

    def state(self) -> dict[str, Tensor | Sequence[Tensor]]:
        """The moments, beside each layer's first parameter, and how far they are made."""
        sums = [nothing() for _ in range(self._count)]
        sizes = [nothing() for _ in range(self._count)]
        for key, moments in self.moments.items():
            # Copies: layers share sums, and torch.distributed.checkpoint loads into what is here.
            sums[key], sizes[key] = moments.sums.clone(), torch.cat([moments.size, self.answers[key]])
        counts = {SEEN: as_count(self.seen), STEPS: as_count(self.steps)}
        return {SUMS: sums, SIZE: sizes, **counts, **super().state()}

    def check_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """Raise a ValueError if other layers are held there, or with another rank."""
        super().check_state(found, parameters)
        if SUMS in found:
            shapes = [self.moments[i].sums.shape if i in self.moments else (0,) for i in range(self._count)]
            require_shapes(SUMS, found[SUMS], shapes)

    def load_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """The opposite of :meth:`state`; without it, what C is made of stays, as φ does."""
        super().load_state(found, parameters)
        if SUMS not in found:
            return
        self._new, self._new_answers, self._covariances = {}, {}, {}
        last: Moments | None = None
        for key, held in self.moments.items():
            sums, size = found[SUMS][key], found[SIZE][key]
            self.moments[key] = self._empty(held.sums.shape[1], held.sums)
            self.answers[key] = torch.zeros_like(self.answers[key])
            if sums is not None and size is not None:
                own, answers = size.to(held.size, copy=True).split(2)
                if last is None or not _equal(last, sums, own):
                    last = Moments(sums.to(held.sums, copy=True), own.clone(), self.rank)
                # Neighbours go on sharing what they shared.
                self.moments[key] = last
                self.answers[key] = answers.clone()
        seen, steps = lone(found, SEEN), lone(found, STEPS)
        self.seen, self.steps = 0 if seen is None else int(seen), 0 if steps is None else int(steps)


def _flat(x: Tensor, chosen: Tensor | None) -> Tensor:
    """The chosen rows of inputs or answers, shape (n, width)."""
    flat = x.detach().reshape(-1, x.shape[-1])
    return flat if chosen is None else flat[chosen.reshape(-1).to(x.device)]


def _is_nothing(layer: Linear) -> bool:
    """Whether LoRA's B is zero."""
    matrices: Any = layer.module.lora_B
    return not bool(matrices[layer.adapter].weight.detach().any())


def _equal(moments: Moments, sums: Tensor, size: Tensor) -> bool:
    same = moments.sums.shape == sums.shape and moments.sums.dtype == sums.dtype
    return same and torch.equal(moments.size, size) and torch.equal(moments.sums, sums.to(moments.sums.device))


def _add_(g: Any, whole: Tensor, factor: float) -> None:
    """Add a whole tensor to a gradient that may be sharded."""
    if dtensor.is_sharded(g):
        whole, g = dtensor.local([dtensor.shard_like(whole, g), g])
    g.add_(whole, alpha=factor)

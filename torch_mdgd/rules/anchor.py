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
from torch_mdgd.models.linear import Linear, trained_linear_layers, uncovered
from torch_mdgd.parallel import dtensor
from torch_mdgd.rules import penalty
from torch_mdgd.rules.around import Around, Plain
from torch_mdgd.rules.base import Rule, Weights, as_count, count_of
from torch_mdgd.rules.covariances import SUMS, Covariances

STEPS = "anchor_steps"


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
        tokens: what C is made of in the text decoder: "prompt" (image and question tokens), "image", which keeps more
            sight and less of the form of old answers, or "all", answers too. Other layers, as the connector's, count
            all that enters them.
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
        self.tokens, self.relative = tokens, relative
        self.warmup, self.every = require_whole("Anchor: warmup", warmup), require_whole("Anchor: every", every)
        self.covariances = Covariances(self.rank, tokens, self.warmup, relative)
        # How many steps were combined.
        self.steps = 0
        self._model, self._parts, self._text = model, list(parts), text_module
        # Of the parameters that it was told of.
        self._count = 0
        self._pending: tuple[Any, ...] | None = None
        # For the loss: the trained parameters, and φ.
        self._theta: list[Any] = []
        self._phi: list[Tensor] = []

    def __repr__(self) -> str:
        inner = "" if isinstance(self.rule, Plain) else f", rule={self.rule}"
        return f"Anchor({self.weights['strength']:g}, rank={self.rank}{inner})"

    @property
    def layers(self) -> list[Linear]:
        """The layers that are held."""
        return self.covariances.layers

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
        first = self._count
        places = {p: first + i for i, p in enumerate(parameters)}
        self._count += len(places)
        found = trained_linear_layers(self._model, places, self._text, self._parts)
        left = uncovered(self._model, places, found)
        found = self._without_second_matrices(found)
        for layer in found:
            held = [parameters[i - first] for i in (layer.weight, layer.bias) if i is not None]
            if any(p.is_shard() and p.dim for x in held for p in getattr(x, "placements", ())):
                raise ValueError(f"Anchor: {layer.name} is not sharded by rows, along its first dimension")
        self.covariances.add(found, dtensor.local([parameters[layer.key - first] for layer in found]))
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
            if self.covariances.seen < self.warmup:
                stack.enter_context(self.covariances.watching(images, batch))
            yield

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
            images: marks image tokens, bool of shape (batch, tokens); asked for by ``tokens="image"``.
            group: processes that each have batches of their own, as many on each; without it, all processes have the
                same batches.

        Returns:
            this rule.

        Raises:
            ValueError: no batch; no ``images`` where ``tokens="image"``.
        """
        if self.tokens == "image" and images is None:
            raise ValueError("Anchor.calibrate: tokens='image' needs images, which marks the image tokens of a batch")
        if not self.layers:
            # Which layers are trained is known when the optimizer is built.
            self._pending = batches, images, group
            return self
        training = [m for m in self._model.modules() if m.training]
        self._model.eval()
        try:
            with self.covariances.made_anew():
                count = 0
                for batch in batches:
                    mask = torch.zeros(1, dtype=torch.bool, device="cpu") if images is None else images(batch)
                    with self.covariances.watching(mask, batch):
                        self._model(**{name: x for name, x in batch.items() if name != "labels"})
                    self.covariances.take_in([group] if group is not None else [])
                    count += 1
                if not count:
                    raise ValueError("Anchor.calibrate: batches is empty")
        finally:
            for module in training:
                module.training = True
        self.covariances.warn_of_idle()
        return self

    def sum_over(self, groups: Sequence[Any]) -> None:
        """From now on, inputs are those of the processes of these groups; ``mdgd_backward`` says so itself."""
        super().sum_over(groups)
        self.covariances.groups = groups

    def forget(self) -> None:
        """Forget the inputs of the step under way."""
        super().forget()
        self.covariances.forget()

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
        for layer in self.layers:
            if strength[layer.key]:
                penalty.pull_(layer, self.covariances.of(layer), g, parameters, difference, strength[layer.key])

    def begin_pull(self, parameters: Sequence[Tensor]) -> bool:
        """Take in what the passes of this step brought to the layers, and count the step.

        Args:
            parameters: T parameters, of which only the devices are read.

        Returns:
            whether the pull comes at this step.

        Raises:
            RuntimeError: processes were calibrated with different batches.
        """
        self.covariances.follow(parameters)
        self.covariances.close_step()
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
        factor = self.weights["strength"] * scale * self.every
        with exact({x.device for x in values.values()}):
            c = self.covariances.of(layer)
            out = {i: torch.zeros_like(x, dtype=c.matrix.dtype) for i, x in values.items()}
            penalty.pull_(layer, c, out, values, lambda i: values[i] - phi(i), factor)
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
        self._theta = trained
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
        theta = self._theta
        self.covariances.follow(theta)
        self._phi = [x.to(p.device) for x, p in zip(self._phi, theta, strict=True)]
        with exact({p.device for p in theta}):
            terms = [penalty.energy(layer, self.covariances.of(layer), theta, self._phi) for layer in self.layers]
        total = torch.stack([x.float().to(terms[0].device) for x in terms]).sum()
        return total * (self.weights["strength"] / 2)

    # --------------------------------------------------------------------------------------------------------------
    # Checkpoints.

    def state(self) -> dict[str, Tensor | Sequence[Tensor]]:
        """What C is made of, beside each layer's first trained parameter, and the numbers of steps."""
        return {**self.covariances.state(self._count), STEPS: as_count(self.steps), **super().state()}

    def check_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """Raise a ValueError if other layers are held there, or with another rank."""
        super().check_state(found, parameters)
        if SUMS in found:
            self.covariances.check_state(found, self._count)

    def load_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """The opposite of :meth:`state`; without it, what C is made of stays, as φ does."""
        super().load_state(found, parameters)
        if SUMS in found:
            self.covariances.load_state(found)
            self.steps = count_of(found, STEPS)


def _is_nothing(layer: Linear) -> bool:
    """Whether LoRA's B is zero."""
    matrices: Any = layer.module.lora_B
    return not bool(matrices[layer.adapter].weight.detach().any())

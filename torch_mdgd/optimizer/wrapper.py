"""``MDGDOptimizer``: wrap any ``torch.optim`` optimizer; capture gradients, combine them by a rule, step."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

# What torch's optimizers use: torch.compiler.disable would import all of dynamo together with this package.
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from torch_mdgd.captures import JOINT, Captures, as_grad, assign, refuse_stray
from torch_mdgd.diagnostics import gradient_diagnostics
from torch_mdgd.kernels import Tensors
from torch_mdgd.kernels.exact import exact
from torch_mdgd.masks.base import Mask, ScoreInputs
from torch_mdgd.models.adapters import can_be_left_out, matrices_from_nothing, without_adapters
from torch_mdgd.optimizer import groups
from torch_mdgd.optimizer.around import Around, refuse
from torch_mdgd.optimizer.groups import COMPACT, Group
from torch_mdgd.optimizer.made import Made, why_no_mask
from torch_mdgd.parallel import ranks
from torch_mdgd.parallel.dtensor import is_sharded
from torch_mdgd.rules.base import KINDS, Rule
from torch_mdgd.rules.mdgd import MDGD
from torch_mdgd.storage import storage_for
from torch_mdgd.storage.entries import pack, unpack
from torch_mdgd.storage.exchange import require_apart

NO_REFERENCE = "the state dict holds no reference: it stays at the wrapped weights: right if training began there"
NO_COPY = (
    "no copy of it is held, since it is the model without its adapters. Begin training with a rule that needs one, as "
    "with regularize above 0"
)


class MDGDOptimizer(Around):
    """Modality-decoupled gradient descent around any optimizer of ``torch.optim``.

    Two gradients are captured at the current weights θ, task g and visual v, and, for the published update, the same
    two at the reference φ. :meth:`combine` leaves d in every ``.grad``; :meth:`step` runs the wrapped optimizer on it.
    With nothing captured, a step is exactly the wrapped optimizer's.

    It is an optimizer in every respect, whose groups, state and defaults are those of ``base``. Global step hooks of
    torch fire twice a step, for this optimizer and for ``base``.

    The rule's weights live in the parameter groups as ``mdgd_<name>``, such as ``mdgd_align``. A group that is given to
    ``base`` with such a key keeps its own value; a schedule may change it at any time. Wrapping ``base`` again, for the
    next task, begins with the new rule's weights and a new φ.

    Args:
        base: the optimizer to wrap; afterwards ``self.base``. φ is copied from its parameters now.
        rule: what becomes of the gradients, see :mod:`torch_mdgd.rules`; ``MDGD()``, the published update, if None.
        mask: which elements may move, see :mod:`torch_mdgd.masks`; ``TopK(0.1)`` makes MDGD-GM of ``MDGD()``.
        compact: keep φ and the wrapped optimizer's state for the elements inside the mask alone. For optimizers that
            treat every element of a parameter alike and apart; see :mod:`torch_mdgd.storage.compact`.
        offload: keep φ in the host's memory, for copies over the bus at each pass at φ; see
            :mod:`torch_mdgd.storage.host`.

    Raises:
        TypeError: ``base`` is no optimizer, is wrapped already, re-evaluates closures (LBFGS), or is DeepSpeed's,
            FSDP1's or ZeRO's; ``rule``, ``mask``, ``compact`` or ``offload`` is of another kind.
        ValueError: an argument is out of range or excludes another, naming them; ``base`` holds a parameter twice.
            ``base`` stays as it was.
    """

    def __init__(
        self,
        base: Optimizer,
        rule: Rule | None = None,
        *,
        mask: Mask | None = None,
        compact: bool = False,
        offload: bool = False,
    ) -> None:
        refuse(base)
        rule = MDGD() if rule is None else rule
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a Rule such as MDGD(), or None, got {rule!r}")
        settings = [groups.settings(group, rule, compact=bool(compact)) for group in base.param_groups]
        parameters = [p for group in base.param_groups for p in group["params"]]
        storage = storage_for(parameters, base, mask, compact, offload)
        masks = None if mask is None or mask.scored else storage.choose(None, parameters)
        rule.attach(parameters, mask is not None)
        # Nothing is refused from here on.
        super().__init__(base)
        self.rule, self._storage = rule, storage
        # Changed in place and never assigned anew: a framework's stand-in may share them and have our methods.
        self._captures = Captures()
        self._made = Made()
        self._recorded: dict[str, Tensor] = {}
        for group, new in zip(base.param_groups, settings, strict=True):
            for p in group["params"] if group.get(COMPACT) else ():
                # Of the elements inside an earlier wrapping's mask.
                base.state.pop(p, None)
            groups.replace(group, new)
        if masks is not None:
            storage.confine(masks, base, parameters)

    # --------------------------------------------------------------------------------------------------------------
    # What a step needs.

    @property
    def parameters(self) -> list[Tensor]:
        """All T parameters in order: the order of gradients, masks and of :meth:`set_gradients`.

        Raises:
            RuntimeError: a group was added to ``base`` behind this optimizer's back.
        """
        return [p for group in self._groups() for p in group["params"]]

    @property
    def mask(self) -> Mask | None:
        """What chooses the mask; None without."""
        return self._storage.mask

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that are trained or have been, in order: those whose φ is held."""
        return [p for p, one in zip(self.parameters, self._storage.trained, strict=True) if one]

    def needs(self, pictures: bool = True) -> tuple[str, ...]:
        """The gradients that the next combine needs: "task", "visual", "reference_task", "reference_visual", in order.

        Args:
            pictures: False for a step without pictures, which needs no more than "task" unless it chooses a mask.

        Raises:
            RuntimeError: it needs gradients at φ, after :meth:`drop_reference`.
        """
        if self._storage.mask_is_due():
            return KINDS
        needs = self.rule.needs(self._weights(), self.mask is not None)
        if self._storage.dropped and KINDS[2] in needs:
            raise RuntimeError(f"{self.rule} needs gradients at the reference: {NO_COPY}")
        return needs if pictures else KINDS[:1]

    def joint(self, measure_every: int | None = None) -> float | None:
        """α where one backward pass of L + αL_v, captured as "joint", gives the d of the next combine; else None.

        Args:
            measure_every: None where so many steps have passed since g and v were last taken apart, or where they never
                were, so that they are now, for the diagnostics.
        """
        if self._storage.mask_is_due() or (measure_every is not None and self._made.since >= measure_every):
            return None
        return self.rule.joint(self._weights(), self.mask is not None)

    def _weights(self) -> dict[str, Tensor]:
        """The rule's weights by parameter: float64, shape (T,), on the CPU."""
        return groups.weights(self._groups(), self.rule)

    def _groups(self) -> list[Group]:
        """The parameter groups, all of which this optimizer knows."""
        return groups.known(self.param_groups, len(self._storage))

    def _idle(self, verb: str) -> list[Tensor]:
        """The parameters, for what must not happen while ``.grad`` or the parameters hold something else."""
        if self._captures.recording or self._storage.swapped:
            raise RuntimeError(f"{verb}: leave capture() and reference() first")
        return self.parameters

    # --------------------------------------------------------------------------------------------------------------
    # Capture.

    @property
    def captured(self) -> dict[str, list[Tensor | None]]:
        """What was captured for this step so far, by kind: the buffers themselves."""
        return self._captures.gradients

    def capture(self, kind: Literal["task", "visual", "joint"], *, scale: float = 1.0) -> AbstractContextManager[None]:
        """Whatever backward passes inside leave in ``.grad`` is kept as this gradient, and ``.grad`` cleared.

        Captures of one kind add up until the next :meth:`combine` (micro-batches). Inside :meth:`reference` they are
        gradients at φ. An exception inside discards all that was captured for this step.

        Args:
            kind: "task", "visual", or "joint" for the gradient of L + αL_v with α of :meth:`joint`.
            scale: the loss scale in force, such as ``scaler.get_scale()``: all captures of a step must agree.

        Raises:
            ValueError: an unknown kind; another scale than this step's earlier captures; a sparse gradient.
            RuntimeError: captures are nested; ``.grad`` holds a gradient that no capture took; no parameter received
                a gradient.
        """
        if kind not in ("task", "visual", JOINT):
            raise ValueError(f"capture: kind must be 'task', 'visual' or 'joint', got {kind!r}")
        if kind == JOINT and (self._storage.swapped or self.joint() is None):
            raise RuntimeError("capture: this step needs task and visual gradients apart: ask joint() before")
        if self._storage.swapped and self._storage.dropped:
            raise RuntimeError(f"capture: a {kind} gradient at the reference: {NO_COPY}")
        self._made.clear()
        name = f"reference_{kind}" if self._storage.swapped else kind
        # While θ is φ v is zero, and would stand beside all else that a step takes which chooses the mask.
        drop_zeros = kind == "visual" and self._storage.mask_is_due()
        return self._captures.record(name, self.parameters, scale, drop_zeros=drop_zeros)

    @torch.no_grad()
    def set_gradients(
        self,
        *,
        task: Tensors | None = None,
        visual: Tensors | None = None,
        reference_task: Tensors | None = None,
        reference_visual: Tensors | None = None,
    ) -> None:
        """Capture gradients computed elsewhere: copied, and added to those captured already.

        Each argument is a sequence in parameter order of tensors of the parameters' shapes, with None for a missing
        gradient, which counts as zero.

        Raises:
            ValueError: a sequence or a tensor of the wrong size, naming kind and parameter; nothing was captured.
            RuntimeError: inside :meth:`capture`.
        """
        self._captures.require_idle("set_gradients")
        self._made.clear()
        given = zip(KINDS, (task, visual, reference_task, reference_visual), strict=True)
        self._captures.add({kind: x for kind, x in given if x is not None}, self.parameters)

    @torch.no_grad()
    def reduce_reference(self) -> None:
        """Form g̃₀ (7) now, which frees one gradient-sized buffer; no captures at φ may follow in this step."""
        self._captures.require_idle("reduce_reference")
        self._captures.reduce_reference(self.parameters, self.rule.drift)

    def average_over(self, group: ranks.Group | None) -> None:
        """From now on, average captures over these processes before combining; FSDP2, which sums, needs no group.

        Args:
            group: a process group, such as ``ddp.process_group``; None for this process alone.
        """
        self._captures.group = group

    @property
    def averaged_over(self) -> ranks.Group | None:
        """The processes that :meth:`average_over` was given; None without."""
        return self._captures.group

    def discard(self) -> None:
        """Forget what was captured, seen or combined since the last step; ``.grad`` stays as it is.

        Raises:
            RuntimeError: inside :meth:`capture`.
        """
        self._captures.require_idle("discard or zero_grad")
        self._captures.clear()
        self._made.clear()
        self.rule.forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` and all that was captured since the last step; a RuntimeError inside :meth:`capture`."""
        self.discard()
        self.base.zero_grad(set_to_none=set_to_none)

    # --------------------------------------------------------------------------------------------------------------
    # The reference.

    @property
    def holds_reference(self) -> bool:
        """Whether φ is held as numbers: False after :meth:`drop_reference`."""
        return not self._storage.dropped

    def is_at_reference(self) -> bool:
        """Whether no trained parameter has left φ, as before the first step; it reads all of them."""
        return self._storage.first_moved(self.parameters) is None

    @contextmanager
    def reference(self, model: nn.Module | None = None, *, places: bool = False) -> Iterator[None]:
        """The reference φ is in the parameters here; θ comes back bit for bit, also after an exception.

        Run forward and backward inside: autograd refuses a backward pass across the exchange. If ``fully_shard`` has
        sharded the parameters, pass the model: it drops what it gathered of them. After :meth:`drop_reference` the
        adapters do nothing here, and gradients cannot be captured.

        Args:
            model: that holds the parameters.
            places: let θ and φ swap places in memory where they can, and not their contents, which takes no time. For
                passes through modules that look up their parameters anew: a CUDA graph, or a view of a parameter that
                somebody keeps, goes on seeing θ.
        """
        if self._storage.swapped or self._captures.recording:
            raise RuntimeError("reference: already inside reference() or capture()")
        parameters = self.parameters
        self._warn_of_moved(parameters)
        if self._storage.dropped and model is not None and can_be_left_out(model):
            self._storage.swapped = True
            try:
                with without_adapters(model):
                    yield
            finally:
                self._storage.swapped = False
            return
        with ranks.resharded(parameters, model):
            self._storage.exchange_(parameters, places)
            try:
                yield
            finally:
                self._storage.exchange_(parameters, places)

    def _warn_of_moved(self, parameters: list[Tensor]) -> None:
        """Before the first step θ is φ, or φ is not what was meant."""
        if not self._made.began:
            self._made.began = True
            self._storage.follow(parameters)
            moved = self._storage.first_moved(parameters)
            if moved is not None:
                warnings.warn(
                    f"parameter {moved} has changed since the optimizer was wrapped, and no step was made: the "
                    "reference is not what training begins with. If weights were loaded after wrapping, call "
                    "set_reference()",
                    stacklevel=5,
                )

    def drop_reference(self, model: nn.Module) -> bool:
        """Hold no copy of φ where it is the model without its adapters. :func:`mdgd_backward` does this by itself.

        So it is before the first step, when all that this optimizer trains is LoRA whose B is zero, the rule needs no
        gradient at φ, and nothing is masked or sharded. :meth:`set_reference` makes copies again. To load by
        ``torch.distributed.checkpoint`` what was saved so, call this on the fresh adapters first.

        Args:
            model: the PeftModel, also inside DistributedDataParallel or torch.compile.

        Returns:
            whether it is done; if not, the copy stays.
        """
        parameters = self._idle("drop_reference")
        if self._made.began or "reference_task" in self.needs() or any(map(is_sharded, parameters)):
            return False
        matrices = matrices_from_nothing(model)
        trained = {p for p in parameters if p.requires_grad}
        if matrices is None or trained != matrices.keys():
            return False
        self._warn_of_moved(parameters)
        return self._storage.drop([matrices.get(p) if p.requires_grad else None for p in parameters])

    @torch.no_grad()
    def set_reference(self, values: Sequence[Tensor] | None = None) -> None:
        """Let φ be the parameters' values now, or these: for weights that were loaded after wrapping, or a next task.

        What a rule has made of the old φ, such as the anchor's covariances, is made anew only if it is asked to.

        Args:
            values: T tensors of the parameters' shapes, in parameter order. With a compact storage they may differ
                from the parameters inside the mask alone.

        Raises:
            RuntimeError: gradients are captured for this step.
            ValueError: another number of values, or one of another shape, naming it; nothing was changed.
        """
        parameters = self._idle("set_reference")
        if self._captures:
            raise RuntimeError("set_reference: gradients are captured for this step; call it before, or zero_grad()")
        if values is not None and len(values) != len(parameters):
            raise ValueError(f"set_reference: {len(values)} values for {len(parameters)} parameters")
        for i, (p, x) in enumerate(zip(parameters, parameters if values is None else values, strict=True)):
            if x.shape != p.shape:
                raise ValueError(f"set_reference: value {i} has shape {tuple(x.shape)}, its parameter {tuple(p.shape)}")
        self._storage.renew(parameters, values)
        self._made.began = True

    # --------------------------------------------------------------------------------------------------------------
    # Combine and step.

    @_disable_dynamo
    @torch.no_grad()
    def combine(self) -> None:
        """Leave d in every ``.grad``, for clipping or a gradient scaler to see; :meth:`step` does it otherwise.

        Raises:
            RuntimeError: a gradient that the update needs was not captured, naming it; ``.grad`` holds one that no
                capture took; inside :meth:`capture` or :meth:`reference`.
        """
        parameters = self._idle("combine")
        with exact({p.device for p in parameters}):
            self._combine(parameters)

    def _combine(self, parameters: list[Tensor]) -> None:
        self._storage.follow(parameters)
        self._captures.require(self.needs(pictures=not self._captures.empty("visual")))
        refuse_stray(parameters)
        if all(kind in self._captures.gradients for kind in KINDS[2:]):
            self.reduce_reference()
        joint = JOINT in self._captures.gradients
        step = self._captures.close(parameters)
        if len(step.gradients) > 1:
            groups.warn_of_idle(self.param_groups, step.d)
        products = step.products(self.rule.measures_one or self._storage.mask_is_due())
        self._made.begin(None if joint else products)
        if self._storage.mask_is_due():
            self._made.refused = why_no_mask(products)
            if self._made.refused is None:
                # No pass follows at these weights, so that autocast's copies of them need not stand beside the choice.
                torch.clear_autocast_cache()
                scores = ScoreInputs(step.task, step.visual, step.reference, self.rule.drift(products))
                self._storage.confine(self._storage.choose(scores, parameters), self.base, parameters)
        if self.rule.corrects:
            self._made.visual = self._storage.restrict_(step.visual)
        w = self._weights()
        difference = partial(self._storage.difference, parameters)
        self.rule.pull_(step.task, parameters, difference, w, step.scale)
        w = {name: x.to(products.device) for name, x in w.items()}
        coefficients = self.rule.coefficients(products, w, self._storage.masked)
        self._storage.combine_(step.d, step.gradients, coefficients)
        self._made.d = [as_grad(x, p) for p, x in zip(parameters, step.d, strict=True)]
        assign(parameters, self._made.d)

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine what was captured, then one step of the wrapped optimizer.

        Args:
            closure: run once, with gradients enabled; it may capture, or leave gradients in ``.grad``. The wrapped
                optimizer does not see it: it would run it again, over the combined gradient.

        Returns:
            what the closure returned.

        Raises:
            RuntimeError: as :meth:`combine`; or the mask could not be chosen because a gradient holds NaN or Inf.
        """
        parameters, loss = self._idle("step"), None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._captures:
            self.combine()
        else:
            # Also before a step of the wrapped optimizer alone: φ of what is unfrozen is its value before it moves.
            self._storage.follow(parameters)
        if self._made.refused is not None and not self._made.replaced(parameters):
            raise RuntimeError(self._made.refused)
        self._storage.step(self.base, parameters, self._correction(parameters))
        self._made.began = True
        self.discard()
        return loss

    def _correction(self, parameters: list[Tensor]) -> Callable[[Tensors, Tensors], None] | None:
        """The rule's correction of this step's moves. One by visual gradients needs those of this very step."""
        visual = self._made.visual_for(parameters)
        if not self.rule.corrects:
            return None
        w = self._weights()
        if visual is None and "visual" in self.rule.needs(w, self.mask is not None):
            return None

        def correct_(after: Tensors, before: Tensors) -> None:
            with exact({p.device for p in parameters}):
                self.rule.correct_(after, before, visual, w)

        return correct_

    # --------------------------------------------------------------------------------------------------------------
    # Groups, checkpoints, diagnostics.

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the wrapped optimizer, with the rule's weights where it has none of its own.

        Its reference is its values now.

        Raises:
            RuntimeError: gradients are captured for this step, or the mask has been chosen.
            ValueError: a weight is out of range, naming it, or a parameter is there twice; nothing was added.
        """
        parameters = self._idle("add_param_group")
        if self._captures or self._made.stands(parameters) or self._storage.masked:
            why = "the mask has been chosen" if self._storage.masked else "gradients are captured for this step"
            raise RuntimeError(f"add_param_group: {why}; add groups before")
        new = groups.settings(param_group, self.rule, compact=COMPACT in self.param_groups[0])
        group, more = groups.copied(param_group)
        groups.replace(group, new)
        require_apart([*parameters, *more])
        self.base.add_param_group(group)
        # Of a step that a gradient scaler has skipped, and of fewer parameters.
        self._made.clear()
        added = self.base.param_groups[-1]["params"]
        self._storage.extend(added)
        self.rule.extend(added)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict; φ, the mask and the rule's state lie in each parameter's state."""
        self._idle("state_dict")
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        inner, own = self._storage.save(self.base)
        for name, x in self.rule.state().items():
            if isinstance(x, Tensor):
                own[name] = [x if one else None for one in self._storage.trained]
            else:
                # Of one that was never trained too, what the rule knows of it, for when it is unfrozen.
                pairs = zip(x, self._storage.trained, strict=True)
                own[name] = [y if one or y.numel() else None for y, one in pairs]
        packed = pack(inner, own)
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; the wrapped optimizer's own works too, and leaves φ as it is.

        Raises:
            ValueError: it belongs to other parameters, naming the first that differs, or holds weights that are out of
                range; nothing was changed.
        """
        parameters = self._idle("load_state_dict")
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        state_dict["param_groups"] = groups.loaded(state_dict["param_groups"], self.param_groups, self.rule)
        inner, found = unpack(state_dict, parameters)
        self.rule.check_state(found, parameters)
        if not self._storage.load(inner, found, self.base, parameters):
            warnings.warn(NO_REFERENCE, stacklevel=2)
        self.rule.load_state(found, parameters)
        self._made.began = True
        self.discard()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @property
    def diagnostics(self) -> dict[str, float]:
        """Numbers about the last combine, computed when asked for (which waits for the device); {} before the first.

        ``cos_task_visual``, ``visual_to_task``, with a reference ``cos_task_reference`` and ``regularizer_to_task``
        (see :func:`torch_mdgd.diagnostics.gradient_diagnostics`), with a mask ``kept_fraction``, the rule's own, and
        whatever :meth:`record` was given.
        """
        products = self._made.products
        values = {**self._recorded, **self.rule.diagnostics()}
        if products is not None:
            values |= gradient_diagnostics(products)
        out = {name: float(value) for name, value in values.items()}
        if self._storage.masked:
            kept, total = self._storage.kept(self.parameters)
            out["kept_fraction"] = kept / total
        return out

    def record(self, **values: Tensor) -> None:
        """Show these scalars in :attr:`diagnostics` too, read from the device only when asked for."""
        self._recorded.update({name: value.detach() for name, value in values.items()})

    def _switch(self, name: str) -> None:
        base: Any = self.base
        self._storage.switch(base, self._idle(name), getattr(base, name))

"""``MDGDOptimizer``: wrap any ``torch.optim`` optimizer; capture gradients, combine them, step."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from torch_mdgd import distributed, equations, settings, sharded
from torch_mdgd.budget import DriftBudget
from torch_mdgd.decoupling import Decoupling
from torch_mdgd.diagnostics import read
from torch_mdgd.drift import VisualDrift
from torch_mdgd.inputs import VisualInputs
from torch_mdgd.kernels import Role
from torch_mdgd.masking import Mask
from torch_mdgd.recall import Recall
from torch_mdgd.roles import DECOUPLED_REFERENCE, ROLES, Captures, assign, destination, refuse_stray
from torch_mdgd.schedule import NOT_CHOSEN, MaskSchedule
from torch_mdgd.storage import NO_REFERENCE, storage_for
from torch_mdgd.wrapper import OptimizerWrapper


class MDGDOptimizer(OptimizerWrapper):
    """Modality-decoupled gradient descent around any optimizer of ``torch.optim``.

    Two gradients are captured at the current weights θ, task g and visual v, and, for the published update, the same
    two at the reference φ. :meth:`combine` leaves d in every ``.grad``; :meth:`step` runs the wrapped optimizer on it.
    See :mod:`torch_mdgd.equations`. With nothing captured, a step is exactly the wrapped optimizer's.

    The hyper-parameters below live in the parameter groups: give a group its own value under the same key.

    Args:
        base: the optimizer to wrap; afterwards ``self.base``. φ is copied from its parameters now.
        update: "regularize" is d = g + αv + βr (9); "reference" is r + αv; "project" is g~ + αv, which needs no
            gradients at φ. Under a mask, "regularize" is M ⊙ (g + αv) (11).
        space: "gradient" changes what the wrapped optimizer gets; "step" (with ``update="project"``) gives it g and
            takes the drift out of the move it makes: see :mod:`torch_mdgd.decoupling`.
        history: k ≥ 1, how many visual gradients are taken out of a move, this step's and those before: 1 removes what
            raises the visual loss, more remove all components along them; see :mod:`torch_mdgd.history`. Step space.
        align: α ≥ 0, the weight of the visual gradient. Gradient space only.
        regularize: β ≥ 0, the weight of r. With 0 no gradients at φ are needed. Only ``update="regularize"``.
        restore: a ≥ 0, the length of the restoring move relative to the step's. Step space only.
        scope: "tensor" projects each parameter on its own, "global" all parameters of that scope as one vector.
        mask: which numbers may move, such as ``TopK(0.1)``: MDGD-GM.
        drift_budget: δ > 0, how far visual features may move, as a part of their size: sets α; ``align`` then is where
            it begins, in units of ‖g‖ / ‖v‖. See :mod:`torch_mdgd.budget`. Gradient space only.
        protect: in step space, take out of moves what would change layers' answers to image tokens, in place of the
            visual gradient, which is not needed then: see :mod:`torch_mdgd.inputs`.
        compact: keep φ and the wrapped optimizer's state for the numbers inside the mask alone. For optimizers that
            treat every number of a parameter alike and apart; see :mod:`torch_mdgd.compact`.
        reference_every: so many steps share the gradients at φ, for one more gradient-sized buffer: r then compares
            with another batch. A mask is chosen from its own step's; see :mod:`torch_mdgd.recall`.

    Raises:
        TypeError: ``base`` is no optimizer, wrapped already, re-evaluates closures (LBFGS), or DeepSpeed's or FSDP1's.
        ValueError: a hyper-parameter is out of range, naming it.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        update: settings.Update = "regularize",
        space: settings.Space = "gradient",
        align: float = 1.0,
        regularize: float = 1.0,
        restore: float = 0.0,
        history: int = 1,
        scope: settings.Scope = "tensor",
        mask: Mask | None = None,
        drift_budget: float | None = None,
        protect: VisualInputs | None = None,
        compact: bool = False,
        reference_every: int = 1,
    ) -> None:
        super().__init__(base)
        self._settings: dict[str, Any] = {
            "update": update, "space": space, "scope": scope,
            "align": align, "regularize": regularize, "restore": restore, "history": history,
        }  # fmt: skip
        for group in base.param_groups:
            settings.complete(group, self._settings)
        parameters = [p for group in base.param_groups for p in group["params"]]
        self._storage = storage_for(parameters, base, mask, compact)
        self._inputs = protect.attached(base.param_groups, mask is not None) if protect is not None else None
        self._decoupling: Decoupling = self._inputs or VisualDrift(base.param_groups, mask is not None, compact)
        self._schedule = MaskSchedule(mask, base.param_groups)
        self._recall = Recall(reference_every, base.param_groups)
        self._budget = DriftBudget(drift_budget, base.param_groups)
        self._captures = Captures()
        self._recorded: dict[str, Tensor] = {}

    @property
    def mask(self) -> Mask | None:
        """The mask that numbers are chosen by."""
        return self._schedule.mask

    @property
    def drift_budget(self) -> float | None:
        """δ, how far visual features may move, as a part of their size; None where α is fixed."""
        return self._budget.budget

    @property
    def inputs(self) -> VisualInputs | None:
        """What protects the layers' answers to image tokens, None where visual gradients do."""
        return self._inputs

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters in order: the order of roles, masks and of :meth:`set_gradients`."""
        found = [p for group in self.param_groups for p in group["params"]]
        if len(found) != len(self._storage):
            raise RuntimeError(
                f"{len(found)} parameters, but a reference for {len(self._storage)}: "
                "call add_param_group on the MDGDOptimizer, not on its base"
            )
        return found

    @property
    def captured(self) -> dict[str, list[Tensor | None]]:
        """What was captured for this step so far, by role: the buffers themselves."""
        return self._captures.gradients

    @property
    def chooses_mask(self) -> bool:
        """Whether the next combine chooses a mask."""
        return self._schedule.due(self._storage.masked, self.param_groups)

    @property
    def required_roles(self) -> tuple[str, ...]:
        """The gradients that the next combine needs: task, with visual directions two, with the reference all four."""
        if self._inputs is not None:
            return ROLES[:1]
        anew = self._recall.held is None and self._regularizes(self.parameters)
        return ROLES if anew or self.chooses_mask else ROLES[:2]

    def capture(self, role: Literal["task", "visual"], *, scale: float = 1.0) -> AbstractContextManager[None]:
        """Whatever backward passes inside leave in ``.grad`` is kept as this role, and ``.grad`` cleared.

        Captures of one role add up until the next :meth:`combine` (micro-batches). Inside :meth:`reference` they are
        gradients at φ. An exception inside discards all that was captured for this step.

        Args:
            role: "task" or "visual".
            scale: the loss scale in force, such as ``scaler.get_scale()``: all captures of a step must agree.

        Raises:
            ValueError: an unknown role; another scale than this step's earlier captures; a sparse gradient.
            RuntimeError: captures are nested; ``.grad`` holds a gradient that no capture took; no parameter received
                a gradient.
        """
        if role not in ("task", "visual"):
            raise ValueError(f"capture: role must be 'task' or 'visual', got {role!r}")
        return self._captures.record(self.role(role), self.parameters, scale)

    def role(self, role: str) -> str:
        """The name of a role where the parameters now are: "task" is "reference_task" inside :meth:`reference`."""
        return f"reference_{role}" if self._captures.at_reference else role

    @contextmanager
    def reference(self, model: nn.Module | None = None) -> Iterator[None]:
        """The reference φ is in the parameters here; θ comes back bit for bit, also after an exception.

        Run forward and backward inside: autograd refuses a backward pass across the exchange. If ``fully_shard`` has
        sharded the parameters, pass the model: it drops what it gathered of them.
        """
        if self._captures.at_reference or self._captures.recording:
            raise RuntimeError("reference: already inside reference() or capture()")
        parameters = self.parameters
        with distributed.resharded(parameters, model):
            self._storage.exchange_(parameters)
            self._captures.at_reference = True
            try:
                yield
            finally:
                self._storage.exchange_(parameters)
                self._captures.at_reference = False

    @torch.no_grad()
    def set_gradients(
        self,
        *,
        task: Role | None = None,
        visual: Role | None = None,
        reference_task: Role | None = None,
        reference_visual: Role | None = None,
    ) -> None:
        """Capture gradients computed elsewhere: copied, and added to those captured already.

        Each argument is a sequence in parameter order of tensors of the parameters' shapes, with None for a missing
        gradient, which counts as zero.

        Raises:
            ValueError: a sequence or a tensor of the wrong size, naming role and parameter; nothing was captured.
        """
        given = zip(ROLES, (task, visual, reference_task, reference_visual), strict=True)
        self._captures.add({role: x for role, x in given if x is not None}, self.parameters)

    def average_over(self, group: distributed.Group | None) -> None:
        """From now on, combine the means of all captures over these processes; not those of FSDP2, which has summed."""
        self._captures.group = group

    def observe_drift(self, sums: Tensor) -> None:
        """Tell the drift budget of this step's features; sums of micro-batches add up. :func:`mdgd_backward` does it.

        Args:
            sums: :func:`~torch_mdgd.budget.drift_sums` of z at θ and at φ; of several processes, their mean or sum.
        """
        self._captures.drift = sums if self._captures.drift is None else self._captures.drift + sums

    @torch.no_grad()
    def reduce_reference(self) -> None:
        """Form g~0 (7) now, which frees one gradient-sized buffer; no captures at φ may follow in this step."""
        if DECOUPLED_REFERENCE not in self._captures:
            self._captures.require(ROLES[2:])
            g0, v0 = self._captures.take(ROLES[2:], self.parameters)
            together = self._together()
            self._captures.gradients[DECOUPLED_REFERENCE] = equations.decouple_reference_(g0, v0, together)

    def discard(self) -> None:
        """Forget what was captured or combined since the last step; ``.grad`` stays as it is."""
        self._captures.clear()
        self._captures.directions = self._captures.combined = None
        self._captures.refused = self._schedule.waits = False
        self._recall.use(None)

    @_disable_dynamo
    @torch.no_grad()
    def combine(self) -> None:
        """Leave d in every ``.grad``, for clipping or a gradient scaler to see; :meth:`step` does it otherwise.

        Raises:
            RuntimeError: a gradient that the update needs was not captured, naming it; ``.grad`` holds one that no
                capture took; inside :meth:`capture` or :meth:`reference`.
        """
        parameters = self._outside("combine")
        needed = self.required_roles
        if self._inputs is not None and "task" in self._captures:
            self._captures.gradients.setdefault("visual", [None] * len(parameters))
        if not self.chooses_mask and self._captures.absent("visual"):
            # No pictures in this step: without gradients at φ it is the wrapped optimizer's own.
            needed = ROLES[:2]
        self._captures.require(
            [role for role in needed if DECOUPLED_REFERENCE not in self._captures or role in ROLES[:2]]
        )
        refuse_stray(parameters)
        if len(needed) == 4 or all(role in self._captures for role in ROLES[2:]):
            self.reduce_reference()
        elif self._recall.held is not None and self._regularizes(parameters) and not self._captures.absent("visual"):
            self._captures.gradients.setdefault(DECOUPLED_REFERENCE, self._recall.held)
        drift = self._budget.drift(self._captures)
        roles = self._captures.take(("task", "visual", DECOUPLED_REFERENCE), parameters)
        self.discard()
        self._recall.use(roles[2] if len(roles) == 3 and self._regularizes(parameters) else None)

        together = self._together()
        self._captures.products = sharded.inner_products(roles), together
        products = equations.pool(*self._captures.products)
        if self.chooses_mask:
            # With NaN or Inf none is chosen: d is NaN, a gradient scaler skips this step, and the next one chooses.
            self._captures.refused = not bool(products.isfinite().all())
            if not self._captures.refused:
                masks = self._schedule.masks(roles, products, together, parameters, self.param_groups)
                if masks is not None:
                    self._storage.choose(masks, self.base, parameters)
                    self._decoupling.begin()
        self._schedule.count(self.param_groups)
        d = [destination(gradients, p) for p, *gradients in zip(parameters, *roles, strict=True)]
        v = settings.in_step_space(self.param_groups, roles[1])
        self._captures.directions = None if v is None else self._storage.restrict_(v)
        strength = self._budget.strength(drift, self._captures.products[0], self.param_groups)
        masked = self._storage.masked
        coefficients = equations.coefficients_of_groups(products, self.param_groups, masked, strength)
        self._storage.combine_(d, roles, coefficients)
        self._captures.combined = [None if x is None else x.to(p.dtype) for p, x in zip(parameters, d, strict=True)]
        assign(parameters, self._captures.combined)

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
        parameters, loss = self._outside("step"), None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._captures:
            self.combine()
        if self._captures.refused:
            raise RuntimeError(NOT_CHOSEN)
        if self._captures.replaced(parameters):
            self._captures.directions = self._recall.used = None
        if not self._schedule.waits:
            decouple_ = self._decoupling.of_step(self._captures.directions, self.param_groups)
            self._storage.step(self.base, parameters, decouple_)
            self._recall.keep(self.param_groups)
        self.discard()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` and all that was captured since the last step."""
        self.discard()
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer, with this optimizer's settings where it has none of its own.

        Its reference is its values now.

        Raises:
            RuntimeError: gradients are captured for this step, or the mask has been chosen.
            ValueError: a setting is out of range, naming it; nothing was added.
        """
        self._outside("add_param_group")
        if self._captures or self._captures.directions is not None or self._storage.masked:
            why = "the mask has been chosen" if self._storage.masked else "gradients are captured for this step"
            raise RuntimeError(f"add_param_group: {why}; add groups before")
        settings.complete(param_group, self._settings)
        self.base.add_param_group(param_group)
        self._storage.extend(self.base.param_groups[-1]["params"])
        self._decoupling.extend(self.base.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, with φ and the mask in each parameter's state."""
        self._outside("state_dict")
        self._before_save()
        return self._after_save(
            self._recall.save(self._decoupling.save(self._storage.save(self.base)), self.parameters)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; the wrapped optimizer's own works too, and leaves φ as it is.

        Raises:
            ValueError: it belongs to other parameters, naming the first that differs, or holds a setting out of
                range; nothing was changed.
        """
        parameters = self._outside("load_state_dict")
        state_dict = self._before_load(state_dict)
        state_dict["param_groups"] = settings.complete_saved(state_dict["param_groups"], self.param_groups)
        self._decoupling.check(state_dict, parameters)
        if not self._storage.load(state_dict, self.base, parameters):
            warnings.warn(NO_REFERENCE, stacklevel=2)
        self._decoupling.load(state_dict, parameters)
        self._recall.load(state_dict, parameters, self.param_groups)
        self.discard()
        self._after_load()

    @property
    def diagnostics(self) -> dict[str, float]:
        """Numbers about the last combine, computed when asked for (which waits for the device); {} before the first.

        ``cos_task_visual``, ``visual_to_task``, with a reference ``cos_task_reference`` and ``regularizer_to_task``
        (see :func:`torch_mdgd.diagnostics.gradient_diagnostics`), with a mask ``kept_fraction``, with a drift budget
        ``visual_drift`` and ``align``, α of the first group, and whatever :meth:`record` was given.
        """
        kept = self._storage.kept(self.parameters) if self._storage.masked else None
        return read(self._recorded | self._budget.recorded, self._captures.products, kept)

    def record(self, **values: Tensor) -> None:
        """Show these scalars in :attr:`diagnostics` too, read from the device only when asked for."""
        self._recorded |= {name: value.detach() for name, value in values.items()}

    def _outside(self, verb: str) -> list[Tensor]:
        """The parameters, for what must not happen while ``.grad`` or the parameters hold something else."""
        if self._captures.recording or self._captures.at_reference:
            raise RuntimeError(f"{verb}: leave capture() and reference() first")
        return self.parameters

    def _regularizes(self, parameters: Sequence[Tensor]) -> bool:
        groups = zip(parameters, settings.per_parameter(self.param_groups), strict=True)
        return any(settings.needs_reference(group, self.mask is not None) for _, group in groups)

    def _together(self) -> Tensor:
        return torch.tensor(settings.together(self.param_groups, "gradient"), device=self.parameters[0].device)

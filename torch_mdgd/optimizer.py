"""``MDGDOptimizer``: wrap any ``torch.optim`` optimizer; capture gradients, combine them, step."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What torch's optimizers use: torch.compiler.disable would import all of dynamo together with this package.
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from torch_mdgd import equations, settings, sharded
from torch_mdgd.budget import DriftBudget
from torch_mdgd.capturing import CapturingOptimizer
from torch_mdgd.decoupling import Decoupling
from torch_mdgd.diagnostics import read
from torch_mdgd.drift import VisualDrift
from torch_mdgd.inputs import VisualInputs
from torch_mdgd.masking import Mask
from torch_mdgd.recall import Recall
from torch_mdgd.roles import DECOUPLED_REFERENCE, ROLES, assign, destination, refuse_stray, warn_of_idle_groups
from torch_mdgd.schedule import NOT_CHOSEN, MaskSchedule
from torch_mdgd.storage import NO_REFERENCE, storage_for


class MDGDOptimizer(CapturingOptimizer):
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
        align: α ≥ 0, the weight of the visual gradient. Gradient space only.
        regularize: β ≥ 0, the weight of r. With 0 no gradients at φ are needed. Only ``update="regularize"``.
        restore: a ≥ 0, the length of the restoring move relative to the step's. Step space only.
        history: k ≥ 1, how many visual gradients are taken out of a move, this step's and those before: 1 removes what
            raises the visual loss, more remove all components along them; see :mod:`torch_mdgd.history`. Step space.
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
        TypeError: ``base`` is no optimizer, wrapped already, re-evaluates closures (LBFGS), or DeepSpeed's or FSDP1's;
            ``mask``, ``protect`` or ``compact`` is of another kind.
        ValueError: an argument is out of range or excludes another, naming them. ``base`` stays as it was.
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
        if protect is not None and not isinstance(protect, VisualInputs):
            raise TypeError(f"protect must be a VisualInputs or None, got {type(protect).__name__}")
        # Copies, until it is known that all goes together.
        groups = [settings.complete(group, self._settings) for group in base.param_groups]
        masked = mask is not None
        parameters = [p for group in groups for p in group["params"]]
        self._recall = Recall(reference_every, groups, masked)
        self._budget = DriftBudget(drift_budget, groups)
        self._storage = storage_for(parameters, base, mask, compact)
        self._schedule = MaskSchedule(mask, groups)
        self._decoupling: Decoupling = (
            VisualDrift(groups, masked, compact) if protect is None else protect.attached(groups, masked)
        )
        self._recorded: dict[str, Tensor] = {}
        for group, completed in zip(base.param_groups, groups, strict=True):
            group.update(completed)

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
        return self._decoupling if isinstance(self._decoupling, VisualInputs) else None

    @property
    def chooses_mask(self) -> bool:
        """Whether the next combine chooses a mask."""
        return self._schedule.due(self._storage.masked, self.param_groups)

    @property
    def required_roles(self) -> tuple[str, ...]:
        """The gradients that the next combine needs: task, with visual directions two, with the reference all four."""
        if self.inputs is not None:
            return ROLES[:1]
        anew = self._recall.held is None and self._needs_reference
        return ROLES if anew or self.chooses_mask else ROLES[:2]

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
        self._schedule.refused = self._schedule.waits = False
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
        self._storage.follow(parameters)
        needed = self.required_roles
        if self.inputs is not None and "task" in self._captures:
            self._captures.gradients.setdefault("visual", [None] * len(parameters))
        if not self.chooses_mask and self._captures.absent("visual"):
            # No pictures in this step: without gradients at φ it is the wrapped optimizer's own.
            needed = ROLES[:2]
        self._captures.require(needed)
        refuse_stray(parameters)
        if len(needed) == 4 or all(role in self._captures for role in ROLES[2:]):
            self.reduce_reference()
        elif self._recall.held is not None and self._needs_reference and not self._captures.absent("visual"):
            self._captures.gradients.setdefault(DECOUPLED_REFERENCE, self._recall.held)
        drift, scale = self._budget.drift(self._captures), self._captures.scale or 1.0
        roles = self._captures.take(("task", "visual", DECOUPLED_REFERENCE), parameters)
        self.discard()
        if any(x is not None for x in roles[1]):
            warn_of_idle_groups(self.param_groups, roles)
        self._recall.use(roles[2] if len(roles) == 3 and self._needs_reference else None)

        together = self._together()
        self._captures.products = sharded.inner_products(roles), together
        products = equations.pool(*self._captures.products)
        if self.chooses_mask:
            masks = self._schedule.masks(roles, products, together, parameters, self.param_groups, scale)
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
        if self._schedule.refused:
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
            ValueError: a setting is out of range or excludes another, naming them; nothing was added.
        """
        self._outside("add_param_group")
        if self._captures or self._captures.directions is not None or self._storage.masked:
            why = "the mask has been chosen" if self._storage.masked else "gradients are captured for this step"
            raise RuntimeError(f"add_param_group: {why}; add groups before")
        completed = settings.complete(param_group, self._settings)
        self._check_groups([*self.param_groups, completed])
        param_group.update(completed)
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
            ValueError: it belongs to other parameters, naming the first that differs, or holds settings that are out of
                range or exclude others; nothing was changed.
        """
        parameters = self._outside("load_state_dict")
        state_dict = self._before_load(state_dict)
        state_dict["param_groups"] = settings.complete_saved(state_dict["param_groups"], self.param_groups)
        self._check_groups(state_dict["param_groups"])
        self._decoupling.check(state_dict, parameters)
        if not self._storage.load(state_dict, self.base, parameters):
            warnings.warn(NO_REFERENCE, stacklevel=2)
        self._decoupling.load(state_dict, parameters)
        self._recall.load(state_dict, parameters, self.param_groups)
        self._schedule.begin()
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

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        self._budget.check_groups(groups)
        self._decoupling.check_groups(groups)

    @property
    def _needs_reference(self) -> bool:
        # Parameters first: that refuses groups which were added to the base, and have no settings.
        return bool(self.parameters) and settings.needs_reference(self.param_groups, self.mask is not None)

    def _together(self) -> Tensor:
        return torch.tensor(settings.together(self.param_groups, "gradient"), device=self.parameters[0].device)

"""The hook API: how gradients get into an optimizer, from backward passes at θ and at the reference φ."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_mdgd import distributed
from torch_mdgd.kernels import Role
from torch_mdgd.roles import ROLES, Captures
from torch_mdgd.storage import Storage
from torch_mdgd.wrapper import OptimizerWrapper


class CapturingOptimizer(OptimizerWrapper):
    """A wrapper that is given gradients by role, and knows φ. What is made of them is for its heirs to say.

    Args:
        base: the optimizer to wrap; afterwards ``self.base``.

    Raises:
        TypeError: ``base`` cannot be wrapped; see :class:`~torch_mdgd.wrapper.OptimizerWrapper`.
    """

    # Where φ is, for an heir to set.
    _storage: Storage

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base)
        self._captures = Captures()

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

    @property
    def averaged_over(self) -> distributed.Group | None:
        """What :meth:`average_over` was told."""
        return self._captures.group

    def observe_drift(self, sums: Tensor) -> None:
        """Tell the drift budget of this step's features; sums of micro-batches add up. :func:`mdgd_backward` does it.

        Args:
            sums: :func:`~torch_mdgd.budget.drift_sums` of z at θ and at φ; of several processes, their mean or sum.
        """
        self._captures.drift = sums if self._captures.drift is None else self._captures.drift + sums

    def _outside(self, verb: str) -> list[Tensor]:
        """The parameters, for what must not happen while ``.grad`` or the parameters hold something else."""
        if self._captures.recording or self._captures.at_reference:
            raise RuntimeError(f"{verb}: leave capture() and reference() first")
        return self.parameters

"""``MDGDEngine``: a rule around DeepSpeed's engine."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from torch_mdgd.diagnostics import gradient_diagnostics
from torch_mdgd.integrations.deepspeed.partition import clear_gradients, shape_of
from torch_mdgd.integrations.deepspeed.passes import Passes
from torch_mdgd.integrations.deepspeed.reference import ZeroReference
from torch_mdgd.integrations.deepspeed.refused import refuse_groups, refuse_rule
from torch_mdgd.integrations.deepspeed.step import ZeroStep
from torch_mdgd.models.tap import Batch, VisualTap
from torch_mdgd.rules.base import Rule
from torch_mdgd.rules.mdgd import MDGD

FILE = "mdgd.safetensors"
FORMAT = "torch_mdgd engine 1"
REFERENCE, RULE = "reference.", "rule."


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
        refuse_rule(rule)
        self.reference = ZeroReference(engine)
        refuse_groups(engine)
        self.engine, self.rule, self.alignment = engine, rule, alignment
        self.tap = tap or VisualTap.for_model(engine.module)
        self.trained = self.reference.trained
        self._step = ZeroStep(engine, rule, self.reference)
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
        passes = Passes(self._step, self.tap, self.alignment, batch, loss, visual_weight, last, scale_wrt_gas)
        if self._begins:
            self._recorded = {}
            if not passes.pictures:
                clear_gradients(self.trained)
        alpha = None if separate else self.rule.joint(self._step.weights, False)
        try:
            with passes.sparing():
                if alpha is not None or "visual" not in self.rule.needs(self._step.weights, False):
                    task_loss, visual_loss = passes.at_once(alpha)
                else:
                    task_loss, visual_loss = passes.one_at_a_time()
        except BaseException:
            self._step.forget()
            raise
        if visual_loss is not None:
            self._recorded["visual_loss"] = self._step.ranks.mean(visual_loss * passes.share)
        if last:
            self._step.forget()
        self._begins = last
        # A wish that was spoken for this micro-batch holds until the next, as accelerate's; the engine's own count too.
        engine.set_gradient_accumulation_boundary(before if boundary is None else boundary)
        return task_loss

    @property
    def diagnostics(self) -> dict[str, float]:
        """As of :attr:`MDGDOptimizer.diagnostics`; angles and lengths are of steps that took g and v apart."""
        values = {**self._recorded, **self.rule.diagnostics()}
        if self._step.products is not None:
            values |= gradient_diagnostics(self._step.products)
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
                if shape != shape_of(p):
                    raise ValueError(f"{path}: the reference of {name} has shape {shape}, the parameter {shape_of(p)}")
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
        self._step.forget()

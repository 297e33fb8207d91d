"""The ways to fine-tune that are compared; a line in METHODS puts one into every table."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from reproductions import methods

FRACTION = 0.10


@dataclass(frozen=True)
class Plan:
    """What a method needs to hold, for the sizes that are computed and not measured.

    "Trained" is every number of the model, or of the adapter; "kept" is the same, or those inside the mask.

    Args:
        gradients: float32 per trained number when the update begins.
        reference: float32 per kept number between steps: φ.
        masks: how many per kept number, masks or positions, and of which dtype.
        sparse: whether only FRACTION of the trained numbers is kept, also by the optimizer's state.
    """

    gradients: int = 1
    reference: int = 0
    masks: tuple[int, torch.dtype] = (0, torch.bool)
    sparse: bool = False


@dataclass(frozen=True, eq=False)
class Method:
    """A way to fine-tune.

    Args:
        name: as printed.
        known_as: its name in ``reproductions.methods.METHODS``, which says how a step is made.
        settings: of that method; its own if empty.
        adapter: "LoRA" or "SHiRA" of peft on every Linear layer, or None to train every number.
        plan: what it needs.
    """

    name: str
    known_as: str = "fine-tune"
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    plan: Plan = field(default_factory=Plan)

    @property
    def installed(self) -> bool:
        return self.adapter is None or importlib.util.find_spec("peft") is not None

    @property
    def wraps(self) -> bool:
        """Whether the optimizer is wrapped."""
        return self.wrapper() is not None

    def wrapper(self, model: nn.Module | None = None) -> dict[str, Any] | None:
        """Keywords of the :class:`MDGDOptimizer`, new at each call; None for plain AdamW."""
        kind = methods.METHODS[self.known_as]
        return kind(kind.Settings(**self.settings)).wrapper(nn.Module() if model is None else model)


PLAIN = Method("Fine-tune")
SHIRA = Method("SHiRA", adapter="SHiRA", plan=Plan(masks=(2, torch.int32)))
MDGD = Method("MDGD", "mdgd", plan=Plan(gradients=3, reference=1))
CHEAPER = (
    Method("MDGD, project", "project", plan=Plan(2, 1)),
    Method("MDGD, step space", "step", plan=Plan(2, 1)),
)
MASKED = (
    Method("MDGD-GM, dense", "mdgd-gm", {"ratio": FRACTION, "compact": False}, plan=Plan(1, 1, (1, torch.bool))),
    Method("MDGD-GM, compact", "mdgd-gm", {"ratio": FRACTION}, plan=Plan(1, 1, (1, torch.int32), sparse=True)),
)
METHODS = (PLAIN, Method("LoRA", adapter="LoRA"), SHIRA, MDGD, *CHEAPER, *MASKED)
WRAPPED = {method.name: method for method in METHODS if method.wraps}
COMPACT = tuple(method for method in MASKED if method.plan.sparse)

"""The ways to fine-tune that are compared; a line in METHODS puts one into every table."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch

from torch_mdgd import TopK

FRACTION = 0.10


@dataclass(frozen=True)
class Plan:
    """What a method needs to hold, for the sizes that are computed and not measured.

    "Trained" is every number of the model, or of the adapter; "kept" is the same, or those inside the mask.

    Args:
        gradients: float32 per trained number when the update begins.
        reference: float32 per kept number between steps: φ, and leaves that stand for the kept numbers.
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
        adapter: "LoRA" or "SHiRA" of peft, or None to train every number.
        mdgd: settings of the :class:`MDGDOptimizer`; None for plain AdamW.
        plan: what it needs.
    """

    name: str
    adapter: str | None = None
    mdgd: dict[str, Any] | None = None
    plan: Plan = field(default_factory=Plan)

    @property
    def installed(self) -> bool:
        return self.adapter is None or importlib.util.find_spec("peft") is not None


PLAIN = Method("Fine-tune")
SHIRA = Method("SHiRA", "SHiRA", plan=Plan(masks=(2, torch.int32)))
MDGD = Method("MDGD", mdgd={}, plan=Plan(gradients=3, reference=1))
CHEAPER = (
    Method("MDGD, project", mdgd={"update": "project"}, plan=Plan(2, 1)),
    Method("MDGD, step space", mdgd={"update": "project", "space": "step"}, plan=Plan(2, 1)),
)
MASKED = (
    Method("MDGD-GM, dense", mdgd={"mask": TopK(FRACTION)}, plan=Plan(2, 1, (1, torch.bool))),
    Method(
        "MDGD-GM, compact",
        mdgd={"mask": TopK(FRACTION), "compact": True},
        plan=Plan(2, 1, (1, torch.int32), sparse=True),
    ),
)
METHODS = (PLAIN, Method("LoRA", "LoRA"), SHIRA, MDGD, *CHEAPER, *MASKED)
WRAPPED = {method.name: method.mdgd for method in METHODS if method.mdgd is not None}
COMPACT = tuple(method for method in MASKED if method.plan.sparse)

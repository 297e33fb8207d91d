"""Model Tailor: what fine-tuning found, but for a tenth of it, goes back."""

import sys
from dataclasses import dataclass

from torch import nn

from reproductions.methods.model_tailor import tailor_
from reproductions.paper.fields import limited
from reproductions.paper.methods import base


@dataclass(frozen=True)
class TailorSettings(base.Settings):
    """Settings of Model Tailor.

    Attributes:
        fraction: of each weight's numbers that is kept.
        omega: weight of how far a number moved; the paper's is 0.5, its published scripts' 0.8.
        sign: of the compensation: "subtract" as in optimal brain surgery, "add" as in the published code.
        connector: what becomes of it: "revert" as in the published code, "keep" for as it was fine-tuned, "tailor".
        samples: of the target task, to see what each layer's inputs are like.
    """

    fraction: float = limited(0.1, least=1e-9, most=1)
    omega: float = limited(0.5, least=0, most=1)
    sign: str = limited("subtract", choices=("subtract", "add"))
    connector: str = limited("revert", choices=("revert", "keep", "tailor"))
    samples: int = limited(128, least=1)


class ModelTailor(base.Method):
    """Post-hoc, on the result of plain fine-tuning."""

    name = "model-tailor"
    title = "Model Tailor"
    begins_with = "fine-tune"
    Settings = TailorSettings

    def finish(self, work: base.Work, module: nn.Module) -> None:
        """Tailor the fine-tuned weights."""
        s = self.settings
        # Each batch is one sample, and stays whole: rows of pictures are not rows of samples in every family.
        batches, every = work.target_batches(s.samples), sys.maxsize
        tailor_(
            module, work.pretrained, batches, fraction=s.fraction, omega=s.omega, sign=s.sign, samples=every,
            connector=s.connector,
        )  # fmt: skip

"""LLaMA-Factory: ``python -m torch_mdgd.integrations.llamafactory train.yaml`` in place of ``llamafactory-cli train``.

The file is LLaMA-Factory's own, with two more keys: ``mdgd_rule``, such as ``MDGD(3.0, regularize=0)``, and
``mdgd_mask``, such as ``Random(0.1)``. On several devices it is started by torchrun:
``torchrun --nproc-per-node 8 -m torch_mdgd.integrations.llamafactory train.yaml``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from llamafactory.hparams import read_args
from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory.train.tuner import run_exp

from torch_mdgd.integrations.transformers import MDGDTrainerMixin
from torch_mdgd.integrations.written import ADVISED


class MDGDSeq2SeqTrainer(MDGDTrainerMixin, CustomSeq2SeqTrainer):  # type: ignore[misc]
    """LLaMA-Factory's trainer of ``stage: sft`` with the passes of MDGD."""


def train(settings: Mapping[str, Any]) -> None:
    """Train as LLaMA-Factory does, with MDGD.

    Args:
        settings: LLaMA-Factory's, with ``mdgd_rule`` and ``mdgd_mask``.

    Raises:
        ValueError: another ``stage`` than sft, or ``use_reentrant_gc``, which drops gradients.
    """
    left = {"use_reentrant_gc": False, **settings}
    # A key without a value is as none.
    options: dict[str, Any] = {
        "rule": left.pop("mdgd_rule", None) or ADVISED,
        "mask": left.pop("mdgd_mask", None) or None,
    }
    if left.get("stage") != "sft":
        raise ValueError(f"MDGD takes its passes with stage: sft, not with stage: {left.get('stage')}")
    if left["use_reentrant_gc"]:
        raise ValueError("use_reentrant_gc: true drops gradients of MDGD: leave it out")
    before = workflow.CustomSeq2SeqTrainer
    workflow.CustomSeq2SeqTrainer = partial(MDGDSeq2SeqTrainer, **options)
    try:
        run_exp(left)
    finally:
        workflow.CustomSeq2SeqTrainer = before


if __name__ == "__main__":
    found = read_args()
    if not isinstance(found, dict):
        raise SystemExit("usage: python -m torch_mdgd.integrations.llamafactory TRAIN.yaml [key=value ...]")
    train(found)

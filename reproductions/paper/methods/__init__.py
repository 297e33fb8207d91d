"""The ways of fine-tuning, in the order of the tables; those beyond the paper come last."""

from reproductions.paper.methods.base import Method, Work
from reproductions.paper.methods.corda import CorDA
from reproductions.paper.methods.fine_tune import FineTune
from reproductions.paper.methods.fine_tune_lv import FineTuneLv
from reproductions.paper.methods.lora import LoRA
from reproductions.paper.methods.mdgd import MDGD, MDGDNoAlign
from reproductions.paper.methods.mdgd_gm import MDGDGM
from reproductions.paper.methods.model_tailor import ModelTailor
from reproductions.paper.methods.osf import OSF
from reproductions.paper.methods.penalties import EWC, L2SP
from reproductions.paper.methods.replay import Replay
from reproductions.paper.methods.zero_shot import ZeroShot

__all__ = ["METHODS", "Method", "Work", "methods_of"]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ZeroShot, FineTune, LoRA, ModelTailor, MDGD, MDGDNoAlign, MDGDGM,
        FineTuneLv, L2SP, EWC, Replay, CorDA, OSF,
    )
}  # fmt: skip


def methods_of(model: str) -> list[str]:
    """The rows of the tables for a model: Model Tailor was published for LLaVA alone."""
    return [m.name for m in METHODS.values() if m.in_paper and (m is not ModelTailor or model.startswith("llava"))]

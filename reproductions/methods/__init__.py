"""The ways of fine-tuning, one a file: those of the paper in the order of its tables, then those beyond it.

All experiments and benchmarks name them by :data:`METHODS`. What a method is made of can be used by itself.
"""

from reproductions.methods.anchor import Anchored
from reproductions.methods.attention import Attention
from reproductions.methods.base import Method, Work, train_last
from reproductions.methods.corda import CorDA
from reproductions.methods.ewc import EWC, ElasticWeights, diagonal_fisher
from reproductions.methods.fine_tune import FineTune
from reproductions.methods.fine_tune_low import FineTuneLow
from reproductions.methods.fine_tune_lv import FineTuneLv
from reproductions.methods.inputs import Inputs
from reproductions.methods.kl import KL
from reproductions.methods.l2_sp import L2SP, PullTowards
from reproductions.methods.lazy import Lazy
from reproductions.methods.lora import LoRA, lora
from reproductions.methods.lora_all import LoRAAll, LoRAAllAnchor, LoRAAllLv
from reproductions.methods.mdgd import MDGD
from reproductions.methods.mdgd_gm import MDGDGM
from reproductions.methods.mdgd_no_align import MDGDNoAlign
from reproductions.methods.model_dowser import ModelDowser
from reproductions.methods.model_tailor import ModelTailor, tailor_
from reproductions.methods.osf import OSF
from reproductions.methods.project import Project
from reproductions.methods.replay import Replay, Replay1, Replay5, Replay10, WithReplay
from reproductions.methods.step import Step
from reproductions.methods.wise_ft import WiseFT
from reproductions.methods.zero_shot import ZeroShot

__all__ = [
    "METHODS",
    "ElasticWeights",
    "Method",
    "PullTowards",
    "Replay",
    "Work",
    "diagonal_fisher",
    "lora",
    "tailor_",
    "train_last",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ZeroShot, FineTune, LoRA, ModelTailor, MDGD, MDGDNoAlign, MDGDGM,
        FineTuneLow, FineTuneLv, Lazy, Anchored, LoRAAll, LoRAAllLv, LoRAAllAnchor, Attention, WiseFT, KL,
        Project, Step, Inputs, L2SP, EWC, Replay1, Replay5, Replay10, WithReplay, CorDA, OSF,
        ModelDowser,
    )
}  # fmt: skip

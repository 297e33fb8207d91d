"""LaLoRA (Sliwa et al. 2025, arXiv 2512.17720): adapters stay where a Laplace approximation is sure of them.

The log-posterior of the adapters' numbers θ, as they begin, is taken to be quadratic, with the Fisher information of
surrogate source data as its curvature: (weight / 2) Σ F (θ − θ₀)², the paper's diagonal form. F is that of samples, and
is 1 on average here. Since B begins at 0, no gradient reaches A there: F holds B alone, by what A lets through.
The published text was not at hand beyond its abstract and summaries: weight and number of samples are ours.
"""

from dataclasses import dataclass

from reproductions.methods import ewc
from reproductions.methods.lora import LoraSettings
from reproductions.methods.lora_all import LoRAAll


@dataclass(frozen=True)
class LaplaceSettings(LoraSettings, ewc.ElasticSettings):
    """Settings of both."""


class LaLoRA(LoRAAll, ewc.EWC):
    """EWC of what LoRA trains, with the connector that it trains in full."""

    name = "lalora"
    title = "LaLoRA"
    Settings = LaplaceSettings

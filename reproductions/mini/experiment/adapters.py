"""LoRA on all linear layers of the language model and the connector, and a pull on what it adds to their weights."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor
from transformers import LlavaForConditionalGeneration

TARGETS = (
    r".*(language|text)_model.*\.(q|k|v|o|gate|up|down)_proj"
    r"|.*multi_modal_projector.*linear_[12]|.*connector.*modality_projection\.proj"
)
"""In a LLaVA and in a SmolVLM."""


def adapt_all(
    model: LlavaForConditionalGeneration, rank: int, remembered: Iterable[Mapping[str, Tensor]] | None = None
) -> PeftModel:
    """Put adapters of this rank, scaled by 2, into every layer of the language model and into the connector.

    The model is changed in place. It computes the same as before until a step is taken.

    Args:
        model: as it was pre-trained.
        rank: r.
        remembered: batches of one example for CorDA (Yang et al. 2024, arXiv 2406.05223), by whose inputs the adapters
            begin as the directions of each weight that matter least; None for adapters that begin as nothing.
    """
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=TARGETS)
    if remembered is not None:
        # Of adapters that begin as a part of the weights peft wants no other scale than 1.
        config.lora_alpha, config.init_lora_weights = rank, "corda"
        config.corda_config = CordaConfig(corda_method="kpm", verbose=False)
        preprocess_corda(model, config, lambda: _run(model, remembered))
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


@torch.no_grad()
def _run(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> None:
    for batch in batches:
        model(**batch)


class PullOfAdapters:
    """(weight / 2) Σ ‖ΔW‖² over adapted layers, ΔW = sBA: an anchor with C = I.

    Args:
        model: adapted and not trained yet, so that B = 0.
        weight: ≥ 0.
    """

    def __init__(self, model: Any, weight: float) -> None:
        self.layers: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
        self.weight = weight

    def __call__(self) -> Tensor:
        """The penalty, with its graph: float32 scalar. No ΔW is formed."""
        return self.weight / 2 * torch.stack(list(self._sizes())).sum()

    def _sizes(self) -> Iterator[Tensor]:
        for layer in self.layers:
            for name, scaling in layer.scaling.items():
                A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
                yield scaling**2 * ((B.T @ B) * (A @ A.T)).sum()

"""LoRA on all linear layers of the language model and the connector, and a pull on what it adds to their weights."""

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration

TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj|.*multi_modal_projector.*linear_[12]"


def adapt_all(model: LlavaForConditionalGeneration, rank: int) -> PeftModel:
    """Put adapters of this rank, scaled by 2, into every layer of the language model and into the connector.

    The model is changed in place. It computes the same as before until a step is taken.
    """
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=TARGETS)
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


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

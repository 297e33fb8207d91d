"""The kinds of small model: how each is built, and what its vision tower hands on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from reproductions.mini.model import llava, smolvlm
from reproductions.mini.model.decoder import WIDTH


@dataclass(frozen=True)
class Architecture:
    """A network of transformers with sizes of ours.

    Attributes:
        build: a new model with random weights (from torch's global generator), in float32.
        tower: its vision tower.
        features: what the tower hands to the connector: (batch, 16, width) from pixels (batch, 3, 48, 48).
        width: of these features.
        dtype: of the numbers in its checkpoints.
    """

    build: Callable[[PreTrainedTokenizerFast], Any]
    tower: Callable[[Any], torch.nn.Module]
    features: Callable[[Any, torch.Tensor], torch.Tensor]
    width: int
    dtype: torch.dtype = torch.float32


ARCHITECTURES: dict[str, Architecture] = {
    "llava": Architecture(llava.build_model, lambda model: model.model.vision_tower, llava.patch_features, WIDTH),
    "llava-10m": Architecture(
        lambda tokenizer: llava.build_model(tokenizer, llava.LARGE),
        lambda model: model.model.vision_tower,
        llava.patch_features,
        llava.LARGE.width,
        torch.bfloat16,
    ),
    "smolvlm": Architecture(
        smolvlm.build_model,
        lambda model: model.model.vision_model,
        smolvlm.patch_features,
        smolvlm.MERGED_WIDTH,
        torch.bfloat16,
    ),
}

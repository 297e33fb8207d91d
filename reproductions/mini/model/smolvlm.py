"""The small SmolVLM, about a million parameters: a tower of small patches, of which it merges four to a token."""

from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
    SmolVLMVisionConfig,
)

from reproductions.mini.model.decoder import answers, decoder
from reproductions.mini.world.pictures import SIZE
from reproductions.mini.world.text import IMAGE

_VISION_WIDTH = 64
_PATCH = 6
_MERGED = 2

MERGED_WIDTH = _VISION_WIDTH * _MERGED**2
"""Of what enters the connector: 2 x 2 patches side by side."""


def build_model(tokenizer: PreTrainedTokenizerFast) -> SmolVLMForConditionalGeneration:
    """A new model with random weights (from torch's global generator), in float32."""
    vision = SmolVLMVisionConfig(
        hidden_size=_VISION_WIDTH,
        intermediate_size=4 * _VISION_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=_PATCH,
        initializer_range=0.05,
    )
    config = SmolVLMConfig(
        vision_config=vision,
        text_config=decoder(tokenizer, key_value_heads=2),
        image_token_id=tokenizer.get_vocab()[IMAGE],
        scale_factor=_MERGED,
        tie_word_embeddings=False,
    )
    model = SmolVLMForConditionalGeneration(config)
    model.generation_config = answers(tokenizer)
    return take_one_picture(model)


class OnePicture(SmolVLMModel):
    """Takes `pixel_values` (batch, 3, 48, 48), one picture a sample, where a SmolVLM takes several."""

    def get_image_features(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().get_image_features(pixel_values[:, None], *args, **kwargs)


def take_one_picture(model: SmolVLMForConditionalGeneration) -> SmolVLMForConditionalGeneration:
    """Make this of the model, which nothing else tells from another: forward passes and `generate` call that method."""
    model.model.__class__ = OnePicture
    return model


def patch_features(model: SmolVLMForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the connector projects: (batch, 16, 256) from pixels (batch, 3, 48, 48), of 2 x 2 patches each."""
    patches = model.model.vision_model(pixel_values).last_hidden_state
    return model.model.connector.pixel_shuffle(patches, _MERGED)

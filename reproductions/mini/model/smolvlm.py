"""The small SmolVLM, about a million parameters: a tower of small patches, of which it merges four to a token."""

from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
    SmolVLMVisionConfig,
)

from reproductions.mini.model.llava import LONGEST_ANSWER
from reproductions.mini.world.pictures import SIZE
from reproductions.mini.world.text import IMAGE

_WIDTH = 128
_VISION_WIDTH = 64
_PATCH = 6
_MERGED = 2

MERGED_WIDTH = _VISION_WIDTH * _MERGED**2
"""Of what enters the connector: 2 x 2 patches side by side."""


def build_model(tokenizer: PreTrainedTokenizerFast) -> SmolVLMForConditionalGeneration:
    """A new model with random weights (from torch's global generator), in float32."""
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = SmolVLMVisionConfig(
        hidden_size=_VISION_WIDTH,
        intermediate_size=4 * _VISION_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=_PATCH,
        initializer_range=0.05,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=3 * _WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.08,
        tie_word_embeddings=False,
        **special,
    )
    config = SmolVLMConfig(
        vision_config=vision,
        text_config=language,
        image_token_id=tokenizer.get_vocab()[IMAGE],
        scale_factor=_MERGED,
        tie_word_embeddings=False,
    )
    model = SmolVLMForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=LONGEST_ANSWER, **special)
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

"""The small LLaVA, about 1.6 million parameters, and a larger one."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from reproductions.mini.model.decoder import SMALL, Size, answers, decoder
from reproductions.mini.world.pictures import SIZE
from reproductions.mini.world.text import IMAGE, IMAGE_TOKENS

_PATCH = 12


LARGE = Size(width=320, heads=10, initializer_range=0.05)
"""Of a model of ten million parameters."""


def build_model(tokenizer: PreTrainedTokenizerFast, size: Size = SMALL) -> LlavaForConditionalGeneration:
    """A new model with random weights (from torch's global generator), in float32."""
    vision = CLIPVisionConfig(
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=3,
        num_attention_heads=size.heads,
        image_size=SIZE,
        patch_size=_PATCH,
        projection_dim=size.width,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder(tokenizer, size),
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = answers(tokenizer)
    return model


def patch_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the vision tower hands to the projector: (batch, 16, width) from pixels (batch, 3, 48, 48)."""
    return model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]

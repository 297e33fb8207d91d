"""The small LLaVA, about 1.6 million parameters."""

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from reproductions.mini.world.pictures import SIZE
from reproductions.mini.world.text import IMAGE, IMAGE_TOKENS

WIDTH = 128
LARGE_WIDTH = 328
"""Of a model of ten million parameters."""
_PATCH = 12
LONGEST_ANSWER = 10


def build_model(tokenizer: PreTrainedTokenizerFast, width: int = WIDTH) -> LlavaForConditionalGeneration:
    """A new model with random weights (from torch's global generator), in float32."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=_PATCH,
        projection_dim=width,
    )
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    # The usual 0.02 leaves so narrow a decoder on a plateau for hundreds of steps.
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.08,
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=LONGEST_ANSWER, **special)
    return model


def patch_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the vision tower hands to the projector: (batch, 16, 128) from pixels (batch, 3, 48, 48)."""
    return model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]

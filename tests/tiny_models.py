"""Random vision-language models of a few thousand numbers, built from configurations, and batches for them."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

IMAGE, VIDEO = 31, 30
TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def built_once(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Copies of one model, which is built with seed 0; random numbers go on as after a build."""

    @functools.cache
    def first(*args: object, **options: object) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return build(*args, **options), torch.get_rng_state()

    @functools.wraps(build)
    def copied(*args: object, **options: object) -> nn.Module:
        model, state = first(*args, **options)
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    return copied


@built_once
def llava(dropout: float = 0.0, tied: bool = False) -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT, attention_dropout=dropout),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=tied,
    )
    return LlavaForConditionalGeneration(config)


def llava_batch(seed: int = 0, images: int = 2) -> dict[str, Tensor]:
    """Each row: padding, a picture of four tokens and three words; the last two words are the answer."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 30, (images, 4), generator=generator)
    picture = torch.full((images, 4), IMAGE)
    tokens = torch.cat([words[:, :1], picture, words[:, 1:]], dim=1)
    attention = torch.ones_like(tokens)
    attention[0, 0] = 0
    labels = tokens.clone()
    labels[:, :-2] = -100
    pixels = torch.randn(images, 3, 8, 8, generator=generator)
    return {"input_ids": tokens, "attention_mask": attention, "pixel_values": pixels, "labels": labels}


def text_batch() -> dict[str, Tensor]:
    tokens = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 2]])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


@built_once
def qwen() -> PreTrainedModel:
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=29,
        vision_end_token_id=28,
    )
    return Qwen2VLForConditionalGeneration(config)


def qwen_batch() -> dict[str, Tensor]:
    """One row: a picture of 4 × 4 patches, which are four tokens, a film of two frames and 2 × 2 patches, one token."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[2, 29, IMAGE, IMAGE, IMAGE, IMAGE, 28, 29, VIDEO, 28, 5, 6, 7]])
    numbers = 3 * 2 * 4 * 4
    return {
        "input_ids": tokens,
        "mm_token_type_ids": (tokens == IMAGE) * 1 + (tokens == VIDEO) * 2,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(16, numbers, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(4, numbers, generator=generator),
        "video_grid_thw": torch.tensor([[1, 2, 2]]),
        "labels": tokens.masked_fill(tokens > 27, -100),
    }

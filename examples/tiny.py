"""What the examples train, so that they run anywhere in seconds: a random LLaVA of a few thousand numbers.

In your own script it is ``AutoModelForImageTextToText.from_pretrained(...)`` and a processor.
"""

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

IMAGE = 31


def make_model(width: int = 16) -> PreTrainedModel:
    """A LLaVA with two layers and a vocabulary of 32."""
    torch.manual_seed(0)
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**size, image_size=8, patch_size=4, projection_dim=width),
            text_config=LlamaConfig(**size, vocab_size=32, max_position_embeddings=32),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    )


def make_samples(count: int) -> list[dict[str, Tensor]]:
    """Pictures of four tokens, a question of two words and an answer of one."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(count):
        words = torch.randint(3, 30, (3,), generator=generator)
        tokens = torch.cat([torch.full((4,), IMAGE), words])
        labels = torch.where(torch.arange(7) < 6, -100, tokens)
        pixels = torch.randn(3, 8, 8, generator=generator)
        samples.append({"input_ids": tokens, "labels": labels, "pixel_values": pixels})
    return samples


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Of its vocabulary, for those who ask for one."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0")

"""A random Llama, and batches for it: all that the benchmarks of training need of transformers."""

from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn

VOCABULARY = 512
IMAGE_TOKEN = 0


def llama(hidden: int, layers: int, vocabulary: int = VOCABULARY, positions: int = 64, heads: int = 4) -> nn.Module:
    """A random LlamaForCausalLM with tied embeddings; token 0 stands for a piece of a picture."""
    # Each row of a table has one in every lap, and to draw the weights takes longer than to copy them.
    return deepcopy(_llama(hidden, layers, vocabulary, positions, heads))


@cache
def _llama(hidden: int, layers: int, vocabulary: int, positions: int, heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=positions, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    config.image_token_id = IMAGE_TOKEN
    return LlamaForCausalLM(config)


def batch_of(rows: int, length: int, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Random tokens, of which the first half of each row is image tokens, and labels for the rest."""
    tokens = torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    tokens[:, : length // 2] = IMAGE_TOKEN
    return {"input_ids": tokens, "labels": tokens.masked_fill(tokens == IMAGE_TOKEN, -100)}

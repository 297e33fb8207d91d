"""What the small models share: a narrow decoder, and greedy answers."""

from typing import Any

from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

WIDTH = 128
LONGEST_ANSWER = 10


def decoder(
    tokenizer: PreTrainedTokenizerFast,
    width: int = WIDTH,
    heads: int = 4,
    key_value_heads: int | None = None,
    initializer_range: float = 0.08,
) -> LlamaConfig:
    """Four layers of so many numbers a token, with the tokenizer's vocabulary and special tokens."""
    # An initializer_range of 0.02, the usual one, leaves so narrow a decoder on a plateau for hundreds of steps.
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads,
        max_position_embeddings=256,
        initializer_range=initializer_range,
        tie_word_embeddings=False,
        **_special(tokenizer),
    )


def answers(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy, and short."""
    return GenerationConfig(do_sample=False, max_new_tokens=LONGEST_ANSWER, **_special(tokenizer))


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}

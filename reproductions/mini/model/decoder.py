"""What the small models share: a narrow decoder, and greedy answers."""

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

WIDTH = 128
LONGEST_ANSWER = 10


@dataclass(frozen=True)
class Size:
    """Of a vision tower and its decoder.

    Attributes:
        width: numbers a token.
        heads: of the attention, of which `width` is a multiple.
        initializer_range: of the decoder's weights, smaller where sums have more terms.
    """

    width: int = WIDTH
    heads: int = 4
    # The usual 0.02 leaves so narrow a decoder on a plateau for hundreds of steps.
    initializer_range: float = 0.08


SMALL = Size()


def decoder(tokenizer: PreTrainedTokenizerFast, size: Size = SMALL, key_value_heads: int | None = None) -> LlamaConfig:
    """Four layers of this size, with the tokenizer's vocabulary and special tokens."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=4,
        num_attention_heads=size.heads,
        num_key_value_heads=key_value_heads or size.heads,
        max_position_embeddings=256,
        initializer_range=size.initializer_range,
        tie_word_embeddings=False,
        **_special(tokenizer),
    )


def answers(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy, and short."""
    return GenerationConfig(do_sample=False, max_new_tokens=LONGEST_ANSWER, **_special(tokenizer))


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}

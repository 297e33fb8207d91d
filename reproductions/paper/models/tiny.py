"""A tokenizer that needs no training: one token a byte, and the special ones that a family names."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WIDTH = 16
"""Hidden size of the tiny networks."""


def byte_tokenizer(
    special: Mapping[str, str], *, begin: str | None = "<s>", end: str = "</s>", **extra: Any
) -> PreTrainedTokenizerFast:
    """Bytes are tokens 0 to 255; after them ``<unk>``, ``<s>``, the end and those named.

    Args:
        special: more tokens, kept whole wherever they stand in a text, by the names of their attributes.
        begin: the token that begins every text; None for none.
        end: the token that ends an answer.
        **extra: the tokenizer's own keywords.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "<unk>", "<s>", end, *special.values()]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin is not None:
        tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token=end,
        extra_special_tokens=dict(special), **extra,
    )  # fmt: skip

"""Words: a word-level tokenizer over a closed vocabulary, and the form of a conversation.

A conversation about a picture reads `<s> <image> x 16 <q> question <a> answer </s> <q> question <a> answer </s>`.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reproductions.mini.world.pictures import COLOURS, KINDS, KNOWN, LETTERS, SPARE
from reproductions.mini.world.questions import CAPTION_QUESTION, DIGIT_QUESTION, NUMBERS, Turn
from reproductions.mini.world.scenes import POSITIONS

IMAGE_TOKENS = 16
"""Image tokens a picture takes: 48 pixels in patches of 12, in both directions."""

IGNORED = -100
"""Label of a token that carries no loss."""

PAD, START, END, IMAGE, QUESTION, ANSWER = SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<q>", "<a>")

_PHRASES = (
    "what is at the ?",
    "what kind of thing is at the ?",
    "is there a letter ?",
    "is there a thing at the ?",
    "what letter is shown ?",
    "which is shown , or ?",
    "how many things are there ?",
    "what colour is the background ?",
    "repeat :",
    "yes no",
    "a and on",
    DIGIT_QUESTION,
    CAPTION_QUESTION,
    *POSITIONS,
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer whose vocabulary holds the words of every pre-trained and target task, and no unknown-word token."""
    words = sorted({*KNOWN, *SPARE, *KINDS, *COLOURS, *LETTERS, *NUMBERS, *" ".join(_PHRASES).split()})
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        additional_special_tokens=[IMAGE, QUESTION, ANSWER],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def prompt(question: str, picture: bool = True) -> str:
    """Text up to the point where the model is to answer, behind a picture or behind none."""
    return " ".join((START, *[IMAGE] * (IMAGE_TOKENS if picture else 0), QUESTION, question, ANSWER))


def conversation(turns: Sequence[Turn], picture: bool = True) -> str:
    """Text of one or more questions with their answers behind a picture, or behind none."""
    spoken = (f"{QUESTION} {question} {ANSWER} {answer} {END}" for question, answer in turns)
    return " ".join((START, *[IMAGE] * (IMAGE_TOKENS if picture else 0), *spoken))


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], padding_side: Literal["left", "right"] = "right"
) -> dict[str, torch.Tensor]:
    """Encode texts to `input_ids` and `attention_mask`, int64 (texts, longest).

    Raises:
        ValueError: a text holds a word outside the vocabulary.
    """
    texts = list(texts)
    unknown = {word for text in texts for word in text.split()} - tokenizer.get_vocab().keys()
    if unknown:
        raise ValueError(f"text holds words outside the vocabulary: {', '.join(sorted(unknown))}")
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, padding_side=padding_side, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def answer_labels(tokenizer: PreTrainedTokenizerFast, input_ids: torch.Tensor) -> torch.Tensor:
    """Labels int64, shaped like `input_ids` (batch, length): answers with their closing `</s>`, `IGNORED` elsewhere."""
    opens = torch.eq(input_ids, tokenizer.get_vocab()[ANSWER]).long()
    closes = torch.eq(input_ids, tokenizer.eos_token_id).long()
    spoken = (opens - closes).cumsum(1) + closes - opens
    return input_ids.masked_fill(spoken == 0, IGNORED)

"""Scores: what a model answers, how often that is right, and what it keeps of a picture.

Answers are generated greedily. Prompts are padded on the left: rows of different length then end at the same column, so
one call answers a whole batch, and `generate` numbers the positions from each row's first real token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from reproductions.mini.world.data import TaskData, prompt_batch

FORM_WORDS = ("a", "and", "on")
"""Words of a caption that every caption has."""


@dataclass(frozen=True)
class Evaluation:
    """Answers of a model to the examples of a task, in the examples' order.

    Attributes:
        task: name of the task.
        expected: the right answers.
        predictions: what the model generated.
        restricted_predictions: the likeliest of the task's own answers, or None for captions: theirs are too many and
            too long to rank, and differ in several words.
    """

    task: str
    expected: tuple[str, ...]
    predictions: tuple[str, ...]
    restricted_predictions: tuple[str, ...] | None

    @property
    def exact(self) -> float:
        """Percentage of generated answers that equal the right one."""
        return _percentage(self.predictions, self.expected)

    @property
    def restricted(self) -> float | None:
        """Percentage right among the task's own answers: knowledge kept, whatever became of the answers' form."""
        return None if self.restricted_predictions is None else _percentage(self.restricted_predictions, self.expected)

    @property
    def words(self) -> float:
        """Percentage of content words that are right, each in its place: a caption is more than right or wrong.

        Of each caption the words that carry content, in order; a wrong, missing or surplus one counts as wrong. An
        answer that should be one word is right or wrong as a whole, as in `exact`.
        """
        pairs = zip(self.predictions, self.expected, strict=True)
        return 100 * fmean(_agreement(given, wanted) for given, wanted in pairs)


def _agreement(given: str, wanted: str) -> float:
    if " " not in wanted:
        return float(given == wanted)
    words, right = ([word for word in answer.split() if word not in FORM_WORDS] for answer in (given, wanted))
    return sum(a == b for a, b in zip(words, right, strict=False)) / max(len(words), len(right))


def _percentage(given: tuple[str, ...], expected: tuple[str, ...]) -> float:
    return 100 * fmean(a == b for a, b in zip(given, expected, strict=True))


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, data: TaskData, batch_size: int = 100
) -> Evaluation:
    """Answer every example of `data`; the model keeps its mode (training or evaluation).

    Every answer of a task with an answer set is one word, so the first generated token's logits rank the whole answers.

    Raises:
        ValueError: `data` is empty.
    """
    if not len(data):
        raise ValueError(f"data holds no examples of {data.task}")
    candidates = torch.tensor(tokenizer.convert_tokens_to_ids(list(data.answers)), dtype=torch.long)
    predictions: list[str] = []
    restricted: list[str] = []
    training = model.training
    model.eval()
    for start in range(0, len(data), batch_size):
        batch = prompt_batch(data[start : start + batch_size].examples, tokenizer)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        # The annotations of `generate` do not admit transformers' own models.
        generated = cast(Any, model).generate(**batch, output_logits=True, return_dict_in_generate=True)
        words = generated.sequences[:, batch["input_ids"].shape[1] :]
        predictions += tokenizer.batch_decode(words, skip_special_tokens=True)
        if data.answers:
            first = generated.logits[0].cpu()[:, candidates].argmax(-1)
            restricted += [data.answers[i] for i in first.tolist()]
    model.train(training)
    expected = tuple(example.answer for example in data.examples)
    return Evaluation(data.task, expected, tuple(predictions), tuple(restricted) if data.answers else None)


@torch.no_grad()
def visual_features(model: LlavaForConditionalGeneration, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden layer at the image tokens, z of Eq. 4 and 5: (image tokens in the batch, hidden), in row order.

    Args:
        model: the model.
        batch: as of `data.training_batch` or `data.prompt_batch`; only its first 1 + 16 columns reach an image token,
            but all are passed so that padding is masked as in training.
    """
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "pixel_values")}
    hidden = model.model(**inputs).last_hidden_state
    return hidden[inputs["input_ids"] == model.config.image_token_id]

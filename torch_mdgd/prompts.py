"""General questions about pictures, for :meth:`torch_mdgd.rules.Anchor.calibrate`: they know nothing of any task."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

QUESTIONS = (
    "What is in this picture?",
    "Describe the picture in one sentence.",
    "Describe the picture in detail.",
    "What is the main object?",
    "What stands in the background?",
    "What stands in front?",
    "How many objects are there?",
    "How many people do you see?",
    "Is there an animal in the picture?",
    "Is there a person in the picture?",
    "Is there any text in the picture?",
    "What does the text say?",
    "Which letters or digits do you see?",
    "What colour is the largest object?",
    "Which colours do you see?",
    "What is the colour of the background?",
    "What shape is the object in the middle?",
    "What is the object on the left?",
    "What is the object on the right?",
    "What is above the other objects?",
    "What is below the other objects?",
    "Where is the smallest object?",
    "Is the picture a photograph, a drawing or a chart?",
    "Was the picture taken indoors or outdoors?",
    "What time of day is it?",
    "What is the weather like?",
    "What season is it?",
    "What are the people doing?",
    "What are they wearing?",
    "What is the person holding?",
    "What is the mood of the picture?",
    "What is unusual about the picture?",
    "What could have happened before?",
    "What could happen next?",
    "Which material is the object made of?",
    "What is the object used for?",
    "Which brand or sign do you see?",
    "What kind of vehicle is it?",
    "What kind of animal is it?",
    "What kind of plant is it?",
    "What kind of food is it?",
    "What kind of room is it?",
    "What kind of building is it?",
    "Which sport is played?",
    "Which instrument is played?",
    "Is it A, B, C or D?",
    "Answer with one word: what is it?",
    "Answer yes or no: is there a car?",
    "Answer yes or no: is it red?",
    "Give a number: how many windows are there?",
    "List the objects in the picture.",
    "Compare the two largest objects.",
    "Which object is closest to the camera?",
    "Which object is farthest away?",
    "Which object is the tallest?",
    "Are two of the objects the same?",
    "What do the objects have in common?",
    "What is written at the top?",
    "What is the title of the chart?",
    "Which value is the largest?",
    "What does the axis show?",
    "What does the arrow point to?",
    "Which part of the body is shown?",
    "Does anything look abnormal?",
    "Write a caption for the picture.",
    "Write a short story about the picture.",
    "Which question would you ask about the picture?",
    "What can you not tell from the picture?",
    "Translate the text in the picture.",
    "Explain the picture to a child.",
)


def random_words(tokenizer: Any, count: int, seed: int = 0, least: int = 3, most: int = 8) -> list[str]:
    """Prompts of words drawn from a tokenizer's vocabulary: they know nothing of any question.

    Args:
        tokenizer: of transformers.
        count: how many prompts.
        seed: of the draw.
        least: words in the shortest prompt.
        most: words in the longest.

    Raises:
        ValueError: the vocabulary has no words.
    """
    special = set(tokenizer.all_special_ids)
    decoded = (tokenizer.decode([i]).strip() for i in sorted(set(tokenizer.get_vocab().values()) - special))
    words = sorted({word for word in decoded if word.isalpha()})
    if not words:
        raise ValueError("random_words: the tokenizer's vocabulary holds no words")
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(least, most))) for _ in range(count)]


def question_batches(
    processor: Any,
    pictures: Sequence[Any],
    questions: Sequence[str] = QUESTIONS,
    *,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Iterator[Mapping[str, Any]]:
    """Each picture under a question drawn at random, as the processor's chat template writes it.

    Args:
        processor: of a vision-language model of transformers; without a chat template, its image token and the
            question stand in two lines.
        pictures: of the task, as the processor takes them; a few hundred do.
        questions: such as ``QUESTIONS`` or those of :func:`random_words`.
        batch_size: pictures in a batch.
        seed: of the draw.
        device: of the batches.

    Yields:
        what the model is called with, without labels.

    Raises:
        ValueError: no pictures or no questions; the processor has neither chat template nor image token.
    """
    if not len(pictures) or not questions:
        raise ValueError(f"question_batches: needs both, got {len(pictures)} pictures and {len(questions)} questions")
    draw = random.Random(seed)
    for start in range(0, len(pictures), batch_size):
        chosen = list(pictures[start : start + batch_size])
        batch = processed(processor, chosen, [draw.choice(questions) for _ in chosen])
        yield {name: x.to(device) if device is not None and hasattr(x, "to") else x for name, x in batch.items()}


def processed(processor: Any, pictures: Sequence[Any], questions: Sequence[str], **options: Any) -> Mapping[str, Any]:
    """A batch of pictures, each under its question.

    Where the chat template writes the token that begins a text, the tokenizer adds no second one, as when transformers
    applies the template and tokenizes at once.

    Args:
        processor: as of :func:`question_batches`.
        pictures: as the processor takes them.
        questions: as many.
        **options: of the processor.

    Raises:
        ValueError: the processor has neither a chat template nor an image token.
    """
    texts = [prompt(processor, question) for question in questions]
    first = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    if first and texts[0].startswith(first):
        options["add_special_tokens"] = False
    batch: Mapping[str, Any] = processor(
        images=[[x] for x in pictures], text=texts, return_tensors="pt", padding=True, **options
    )
    return batch


def prompt(processor: Any, question: str) -> str:
    """The text of a question about one picture, up to where the answer begins.

    Args:
        processor: as of :func:`question_batches`.
        question: what is asked.

    Raises:
        ValueError: the processor has neither a chat template nor an image token.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text
    token = getattr(processor, "image_token", None)
    if not token:
        raise ValueError("the processor has neither a chat template nor an image token")
    return f"{token}\n{question}"

"""A-OKVQA (Schwenk et al. 2022, arXiv 2206.01718), its multiple-choice form."""

from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np

from reproductions.paper.data.dataset import DataSet, Split
from reproductions.paper.data.examples import Example
from reproductions.paper.data.parquet import PICTURE
from reproductions.paper.data.prompts import LETTER, options
from reproductions.paper.data.rows import Row
from reproductions.paper.data.shapes import draw, options_with


@dataclass(frozen=True)
class AOKVQA(DataSet):
    name = "aokvqa"
    title = "A-OKVQA"
    repository = "HuggingFaceM4/A-OKVQA"
    metric = "letter"
    splits: ClassVar = {"train": Split(17_056, 0.9), "validation": Split(1_145, 0.06)}
    evaluation = "validation"
    training = "train"
    validation = "train"
    columns = ("image", "question_id", "question", "choices", "correct_choice_idx")

    def example(self, row: Row) -> Example:
        choices = row.texts("choices")
        letter = row.choice(choices, row.number("correct_choice_idx"))
        question = f"{row.text('question')}\n{options(choices)}{LETTER}"
        return Example(row.text("question_id"), row.picture(), question, (letter,), letter, choices)

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"image": PICTURE, "question_id": text, "question": text, "choices": datasets.List(text),
                "correct_choice_idx": datasets.Value("int8"), "direct_answers": text,
                "difficult_direct_answer": datasets.Value("bool"), "rationales": datasets.List(text)}  # fmt: skip

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing = draw(rng)
        choices, answer = options_with(drawing.colour, rng)
        # The hub's copy writes the ten direct answers as one text.
        return {"image": drawing.stored, "question_id": f"{index:022d}", "question": "What colour is the shape?",
                "choices": choices, "correct_choice_idx": answer, "direct_answers": str([drawing.colour] * 10),
                "difficult_direct_answer": False, "rationales": [f"It is {drawing.colour}."] * 3}  # fmt: skip

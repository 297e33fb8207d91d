"""ScienceQA (Lu et al. 2022, arXiv 2209.09513), the questions with an image."""

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
class ScienceQA(DataSet):
    name = "scienceqa"
    title = "ScienceQA"
    repository = "{organisation}/ScienceQA"
    folder = "ScienceQA-IMG"
    metric = "letter"
    splits: ClassVar = {"train": Split(6_218, 0.4), "validation": Split(2_097, 0.13), "test": Split(2_017, 0.13)}
    evaluation = "test"
    training = "train"
    validation = "validation"
    columns = ("image", "question", "choices", "answer", "hint")
    answer_tokens = 16

    def example(self, row: Row) -> Example:
        choices = row.texts("choices")
        letter = row.choice(choices, row.number("answer"))
        hint = row.optional("hint")
        context = f"Context: {hint}\n" if hint else ""
        question = f"{context}{row.text('question')}\n{options(choices)}{LETTER}"
        return Example(str(row.index), row.picture(), question, (letter,), letter, choices)

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"image": PICTURE, "question": text, "choices": datasets.List(text), "answer": datasets.Value("int8"),
                "hint": text, "task": text, "subject": text}  # fmt: skip

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing = draw(rng)
        choices, answer = options_with(drawing.colour, rng)
        hint = "Shapes come in four colours." if index % 2 else ""
        return {"image": drawing.stored, "question": "Which colour does the shape have?", "choices": choices,
                "answer": answer, "hint": hint, "task": "closed choice", "subject": "natural science"}  # fmt: skip

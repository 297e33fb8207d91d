"""TextVQA (Singh et al. 2019, arXiv 1904.08920): questions about text in pictures."""

from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np

from reproductions.paper.data.dataset import DataSet, Split
from reproductions.paper.data.examples import Example
from reproductions.paper.data.parquet import PICTURE
from reproductions.paper.data.prompts import SHORT, most_common
from reproductions.paper.data.rows import ANNOTATORS, Row
from reproductions.paper.data.shapes import draw


@dataclass(frozen=True)
class TextVQA(DataSet):
    """Attributes:
    ocr: put the tokens that a text recognizer found into the prompt, without which the published zero-shot score of
        LLaVA is out of reach.
    """

    name = "textvqa"
    title = "TextVQA"
    repository = "{organisation}/textvqa"
    metric = "vqa"
    splits: ClassVar = {"train": Split(34_602, 6.2, 9.8), "validation": Split(5_000, 0.9, 1.4)}
    evaluation = "validation"
    training = "train"
    validation = "train"
    columns = ("image", "question", "answers", "ocr_tokens", "question_id")

    ocr: bool = True

    def example(self, row: Row) -> Example:
        answers = row.texts("answers", ANNOTATORS)
        tokens = f"\nReference OCR token: {', '.join(row.values['ocr_tokens'] or ())}" if self.ocr else ""
        question = row.text("question").capitalize() + tokens + SHORT
        return Example(row.text("question_id"), row.picture(), question, answers, most_common(answers))

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"image_id": text, "question_id": datasets.Value("int32"), "question": text, "image": PICTURE,
                "answers": datasets.List(text), "ocr_tokens": datasets.List(text)}  # fmt: skip

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing = draw(rng)
        return {"image_id": f"{index:016x}", "question_id": index, "question": "What is written on the sign?",
                "image": drawing.stored, "answers": [drawing.colour] * 8 + [drawing.text] * 2,
                "ocr_tokens": [drawing.colour]}  # fmt: skip

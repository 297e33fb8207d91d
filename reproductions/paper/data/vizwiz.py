"""VizWiz-VQA (Gurari et al. 2018, arXiv 1802.08218): photographs by blind people, ten answers each."""

from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np

from reproductions.paper.data.dataset import DataSet, Split
from reproductions.paper.data.examples import Example
from reproductions.paper.data.parquet import PICTURE
from reproductions.paper.data.prompts import SHORT, UNANSWERABLE, most_common
from reproductions.paper.data.rows import ANNOTATORS, Row
from reproductions.paper.data.shapes import draw


@dataclass(frozen=True)
class VizWiz(DataSet):
    name = "vizwiz"
    title = "VizWiz"
    repository = "{organisation}/VizWiz-VQA"
    metric = "vqa"
    splits: ClassVar = {"val": Split(4_319, 2.1)}
    evaluation = "val"
    columns = ("question_id", "image", "question", "answers", "category")

    def example(self, row: Row) -> Example:
        answers = row.texts("answers", ANNOTATORS)
        question = row.text("question").capitalize() + UNANSWERABLE + SHORT
        extra = {"category": row.optional("category")}
        return Example(row.text("question_id"), row.picture(), question, answers, most_common(answers), extra=extra)

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"question_id": text, "image": PICTURE, "question": text, "answers": datasets.List(text),
                "category": text}  # fmt: skip

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing = draw(rng)
        # Every fourth question cannot be answered from the picture, and one annotator in ten disagrees.
        open_question = index % 4 != 3
        asked = "What colour is this?" if open_question else "What is the price of this?"
        answer, other = (drawing.colour, drawing.text) if open_question else ("unanswerable", "unsuitable")
        return {"question_id": f"VizWiz_val_{index:08d}", "image": drawing.stored, "question": asked,
                "answers": [answer] * 9 + [other], "category": "color" if open_question else answer}  # fmt: skip

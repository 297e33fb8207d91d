"""PathVQA (He et al. 2020, arXiv 2003.10286): questions about pathology pictures."""

from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np

from reproductions.paper.data.dataset import DataSet, Split
from reproductions.paper.data.examples import Example
from reproductions.paper.data.parquet import PICTURE
from reproductions.paper.data.prompts import SHORT
from reproductions.paper.data.rows import Row
from reproductions.paper.data.shapes import draw


@dataclass(frozen=True)
class PathVQA(DataSet):
    name = "pathvqa"
    title = "PathVQA"
    repository = "flaviagiammarino/path-vqa"
    metric = "yes_no_or_open"
    splits: ClassVar = {
        "train": Split(19_654, 0.45, 3.2), "validation": Split(6_259, 0.15, 1.2), "test": Split(6_719, 0.16, 1.1),
    }  # fmt: skip
    evaluation = "test"
    training = "train"
    validation = "validation"
    columns = ("image", "question", "answer")

    def example(self, row: Row) -> Example:
        answer = row.text("answer")
        return Example(str(row.index), row.picture(), row.text("question") + SHORT, (answer,), answer)

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"image": PICTURE, "question": text, "answer": text}

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing = draw(rng)
        if index % 2:
            return {"image": drawing.stored, "question": "what is the colour of the cell?", "answer": drawing.colour}
        # Half of the questions of the data set are yes or no, in lower case.
        asked = "circle" if index % 4 else drawing.shape
        answer = "yes" if drawing.shape == asked else "no"
        return {"image": drawing.stored, "question": f"is the cell a {asked}?", "answer": answer}

"""POPE (Li et al. 2023, arXiv 2305.10355): is an object in the picture, yes or no."""

from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np

from reproductions.paper.data.dataset import DataSet, Split
from reproductions.paper.data.examples import Example
from reproductions.paper.data.parquet import PICTURE
from reproductions.paper.data.prompts import SHORT
from reproductions.paper.data.rows import Row
from reproductions.paper.data.shapes import COLOURS, draw


@dataclass(frozen=True)
class POPE(DataSet):
    name = "pope"
    title = "POPE"
    repository = "{organisation}/POPE"
    metric = "pope"
    splits: ClassVar = {"test": Split(9_000, 0.26, 1.5)}
    evaluation = "test"
    columns = ("question_id", "question", "answer", "image", "category")

    def example(self, row: Row) -> Example:
        answer = row.text("answer").strip().lower()
        if answer not in ("yes", "no"):
            raise row.error(f"the answer must be yes or no, got {answer!r}")
        # Question ids begin anew in each of the three categories.
        extra = {"question_id": row.text("question_id"), "category": row.optional("category")}
        question = row.text("question").strip() + SHORT
        return Example(str(row.index), row.picture(), question, (answer,), answer, extra=extra)

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"id": text, "question_id": text, "question": text, "answer": text, "image_source": text,
                "image": PICTURE, "category": text}  # fmt: skip

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing = draw(rng)
        present = index % 2 == 0
        others = [colour for colour in COLOURS if colour != drawing.colour]
        colour = drawing.colour if present else str(rng.choice(others))
        return {"id": str(index), "question_id": str(index // 3 + 1), "answer": "yes" if present else "no",
                "question": f"Is there a {colour} {drawing.shape} in the image?", "image": drawing.stored,
                "image_source": f"COCO_val2014_{index:012d}",
                "category": ("random", "popular", "adversarial")[index % 3]}  # fmt: skip

"""TextCaps (Sidorov et al. 2020, arXiv 2003.12462): captions that read the text in a picture."""

from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np

from reproductions.paper.data.dataset import DataSet, Split
from reproductions.paper.data.examples import Example
from reproductions.paper.data.parquet import PICTURE
from reproductions.paper.data.prompts import CAPTION
from reproductions.paper.data.rows import Row
from reproductions.paper.data.shapes import draw


@dataclass(frozen=True)
class TextCaps(DataSet):
    name = "textcaps"
    title = "TextCaps"
    repository = "{organisation}/TextCaps"
    metric = "cider"
    splits: ClassVar = {"train": Split(21_953, 6.2), "val": Split(3_166, 0.92)}
    evaluation = "val"
    training = "train"
    columns = ("caption_str", "image_id", "image")
    answer_tokens = 64

    def example(self, row: Row) -> Example:
        captions = row.texts("caption_str")
        return Example(row.text("image_id"), row.picture(), CAPTION, captions, captions[0])

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"question_id": text, "question": text, "image": PICTURE, "image_id": text,
                "caption_str": datasets.List(text)}  # fmt: skip

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing = draw(rng)
        captions = [f"A sign with a {drawing.text}.", f"A {drawing.text} on a sign.", f"A sign shows a {drawing.text}.",
                    f"A white sign that has a {drawing.text}.", f"The sign says {drawing.text}."]  # fmt: skip
        return {"question_id": str(index), "question": CAPTION, "image": drawing.stored, "image_id": f"{index:016x}",
                "caption_str": captions}  # fmt: skip

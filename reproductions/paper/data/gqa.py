"""GQA (Hudson and Manning 2019, arXiv 1902.09506): questions and images lie in two files, joined on `imageId`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np

from reproductions.paper.data.dataset import DataSet, Split
from reproductions.paper.data.examples import DataError, Example
from reproductions.paper.data.parquet import PICTURE, read_parquet, write_parquet
from reproductions.paper.data.prompts import SHORT
from reproductions.paper.data.rows import Row
from reproductions.paper.data.shapes import draw

_IMAGES = "testdev_balanced_images/testdev-*.parquet"


@dataclass(frozen=True)
class _Joined(Sequence[Mapping[str, Any]]):
    """Questions with the image that each names."""

    questions: Sequence[Any]
    images: Sequence[Any]
    place: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: Any) -> Any:
        question = self.questions[index]
        return {**question, "image": self.images[self.place[question["imageId"]]]["image"]}


@dataclass(frozen=True)
class GQA(DataSet):
    name = "gqa"
    title = "GQA"
    repository = "{organisation}/GQA"
    folder = "testdev_balanced_instructions"
    metric = "exact_match"
    splits: ClassVar = {"testdev": Split(12_578, 0.07)}
    evaluation = "testdev"
    columns = ("id", "imageId", "question", "answer")
    answer_tokens = 16

    def example(self, row: Row) -> Example:
        answer = row.text("answer")
        return Example(row.text("id"), row.picture(), row.text("question") + SHORT, (answer,), answer)

    def patterns(self, split: str) -> list[str]:
        return [self.pattern(split), _IMAGES]

    def rows(self, folder: Path, split: str) -> Sequence[Mapping[str, Any]]:
        questions = read_parquet(self.title, folder, self.pattern(split), self.columns)
        images = read_parquet(self.title, folder, _IMAGES, ("id", "image"))
        place = {name: i for i, name in enumerate(images["id"])}
        for i, name in enumerate(questions["imageId"]):
            if name not in place:
                raise DataError(f"{self.title}, split {split}, row {i}: no image has the id {name!r}")
        return _Joined(questions, images, place)

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"id": text, "imageId": text, "question": text, "answer": text, "fullAnswer": text,
                "isBalanced": datasets.Value("bool")}  # fmt: skip

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing = draw(rng)
        asked, answer = [("What color is the shape?", drawing.colour), ("Which shape is this?", drawing.shape)][
            index % 2
        ]
        return {"id": str(index), "imageId": f"n{index}", "question": asked, "answer": answer,
                "fullAnswer": f"It is a {drawing.text}.", "isBalanced": True, "image": drawing.stored}  # fmt: skip

    def write_sample(self, folder: Path, split: str, n: int, seed: int) -> None:
        rows = list(self.sample_rows(split, n, seed))
        # From last to first, so that only a join by id gives each question its image.
        images = [{"id": row["imageId"], "image": row.pop("image")} for row in reversed(rows)]
        write_parquet(folder / self._file(split), rows, self.features())
        features = {"id": datasets.Value("string"), "image": PICTURE}
        write_parquet(folder / _IMAGES.replace("*", "00000-of-00001"), images, features)

"""OK-VQA (Marino et al. 2019, arXiv 1906.00067): questions that need knowledge from outside the picture.

lmms-eval's copy on the hub holds the validation split alone. Training reads the files of okvqa.allenai.org and
cocodataset.org where a folder has them, and else another copy on the hub.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np

from reproductions.paper.data.dataset import DataSet, Split
from reproductions.paper.data.examples import DataError, Example
from reproductions.paper.data.parquet import PICTURE
from reproductions.paper.data.prompts import SHORT, UNANSWERABLE, most_common
from reproductions.paper.data.rows import ANNOTATORS, Row
from reproductions.paper.data.shapes import draw

QUESTIONS = "OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "mscoco_train2014_annotations.json"
IMAGES = "train2014"
TRAINING = "Multimodal-Fatima/OK-VQA_train"
"""A copy of the training split on the hub. Its columns are checked when it is read."""
_HOW = (
    f"training needs {QUESTIONS} and {ANNOTATIONS} of https://okvqa.allenai.org/download.html and the folder {IMAGES} "
    "of https://cocodataset.org together in FOLDER/okvqa, with --data FOLDER"
)


@dataclass(frozen=True)
class OKVQA(DataSet):
    """Attributes:
    short: ask for a word or a phrase. Without it, models that talk score near the table's zero-shot 0.14.
    """

    name = "okvqa"
    title = "OK-VQA"
    repository = "{organisation}/OK-VQA"
    metric = "vqa"
    splits: ClassVar = {"train": Split(9_009, 1.6), "val2014": Split(5_046, 0.83)}
    evaluation = "val2014"
    training = "train"
    validation = "train"
    columns = ("image", "question", "answers", "question_id")

    short: bool = True

    def example(self, row: Row) -> Example:
        answers = row.texts("answers", ANNOTATORS)
        question = row.text("question") + (UNANSWERABLE + SHORT if self.short else "")
        return Example(row.text("question_id"), row.picture(), question, answers, most_common(answers))

    def holds(self, folder: Path, split: str) -> bool:
        return super().holds(folder, split) or (split == "train" and (folder / QUESTIONS).is_file())

    def repositories(self, split: str, organisation: str) -> list[str]:
        return [TRAINING] if split == "train" else super().repositories(split, organisation)

    def fetch(self, split: str, organisation: str, revision: str | None = None) -> Path:
        try:
            return super().fetch(split, organisation, revision)
        except DataError as error:
            if split != "train":
                raise
            raise DataError(f"{error} Or else {_HOW}.") from error

    def rows(self, folder: Path, split: str) -> Sequence[Mapping[str, Any]]:
        if split == "train" and (folder / QUESTIONS).is_file():
            return self._original(folder)
        try:
            return super().rows(folder, split)
        except DataError as error:
            if split != "train":
                raise
            raise DataError(f"{error}; {_HOW}") from error

    def _original(self, folder: Path) -> list[dict[str, Any]]:
        asked = self._entries(folder / QUESTIONS, "questions")
        answered = {entry["question_id"]: entry for entry in self._entries(folder / ANNOTATIONS, "annotations")}
        rows = []
        for i, entry in enumerate(asked):
            annotation = answered.get(entry["question_id"])
            image = folder / IMAGES / f"COCO_{IMAGES}_{entry['image_id']:012d}.jpg"
            if annotation is None:
                raise DataError(f"{self.title}, split train, row {i}: question {entry['question_id']} has no answers")
            if not image.is_file():
                raise DataError(f"{self.title}, split train, row {i}: there is no picture {image}; {_HOW}")
            rows.append({
                "question_id": entry["question_id"],
                "question": entry["question"],
                "answers": [answer["answer"] for answer in annotation["answers"]],
                "image": {"bytes": None, "path": str(image)},
            })  # fmt: skip
        if not rows:
            raise DataError(f"{self.title}: split train is empty: {folder / QUESTIONS} asks nothing")
        return rows

    def _entries(self, path: Path, key: str) -> list[dict[str, Any]]:
        if not path.is_file():
            raise DataError(f"{self.title}: there is no {path}; {_HOW}")
        try:
            return list(json.loads(path.read_text())[key])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.title}: {path} is not a JSON file with a list of {key}: {error!r}") from error

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"question_id": text, "image": PICTURE, "question": text, "answers": datasets.List(text),
                "question_type": text, "answer_type": text}  # fmt: skip

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing = draw(rng)
        asked, answer = [("What colour has this shape?", drawing.colour),
                         ("How would a teacher name this shape?", drawing.shape)][index % 2]  # fmt: skip
        return {"question_id": str(index), "image": drawing.stored, "question": asked,
                "answers": [answer] * 8 + [drawing.text] * 2, "question_type": "one",
                "answer_type": "other"}  # fmt: skip

    def write_sample(self, folder: Path, split: str, n: int, seed: int) -> None:
        if split != "train":
            return super().write_sample(folder, split, n, seed)
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        asked, annotations = [], []
        for i, row in enumerate(self.sample_rows(split, n, seed)):
            (folder / IMAGES / f"COCO_{IMAGES}_{i:012d}.jpg").write_bytes(row["image"]["bytes"])
            number = int(row["question_id"])
            asked.append({"image_id": i, "question": row["question"], "question_id": number})
            answers = [{"answer_id": k + 1, "raw_answer": answer, "answer_confidence": "yes", "answer": answer}
                       for k, answer in enumerate(row["answers"])]  # fmt: skip
            annotations.append({"image_id": i, "question_id": number, "answers": answers, "question_type": "one"})
        (folder / QUESTIONS).write_text(json.dumps({"questions": asked}))
        (folder / ANNOTATIONS).write_text(json.dumps({"annotations": annotations}))
        return None

"""IconQA (Lu et al. 2021, arXiv 2110.13214): questions about icons; choose a text, choose a picture, or fill in.

A model here sees one picture, so the pictures to choose from are put below the question's, with their letters. The
hub's copy does not hold every picture to choose from; questions whose right one it lacks are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reproductions.paper.data.dataset import DataSet, Split
from reproductions.paper.data.examples import DataError, Example
from reproductions.paper.data.parquet import PICTURE, columns_of, read_parquet
from reproductions.paper.data.prompts import options
from reproductions.paper.data.rows import Row
from reproductions.paper.data.shapes import SHAPES, draw, options_with

_CHOICES = tuple(f"choice_image_{i}" for i in range(5))
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_STATEMENT = "Given a set of images and a question, please provide the answer to the question.\n"
_LETTER = "Please answer with the option letter from the given choices directly."
_SHORT = "Please answer the question using a single word or phrase."
_GAP = 24


@dataclass(frozen=True)
class _Sheet:
    """The question's picture with the lettered pictures to choose from in a row below it."""

    question: Callable[[], Image.Image]
    choices: tuple[Callable[[], Image.Image], ...]

    def __call__(self) -> Image.Image:
        above, below = self.question(), [choice() for choice in self.choices]
        width = max(above.width, sum(image.width + _GAP for image in below))
        sheet = Image.new("RGB", (width, above.height + _GAP + max(image.height for image in below)), "white")
        sheet.paste(above, (0, 0))
        pen, left = ImageDraw.Draw(sheet), 0
        for letter, image in zip("ABCDE", below, strict=False):
            pen.text((left + 4, above.height + 4), letter, font=ImageFont.load_default(14), fill="black")
            sheet.paste(image, (left + _GAP, above.height + _GAP))
            left += image.width + _GAP
        return sheet


@dataclass(frozen=True)
class IconQA(DataSet):
    name = "iconqa"
    title = "IconQA"
    repository = "{organisation}/ICON-QA"
    metric = "iconqa"
    splits: ClassVar = {"val": Split(21_488, 0.33), "test": Split(21_489, 0.34)}
    evaluation = "test"
    validation = "val"
    columns = ("question_id", "question", "choices", "answer", "query_image", "ques_type")
    answer_tokens = 32

    def example(self, row: Row) -> Example:
        asked, kind, answer = row.text("question"), row.text("ques_type"), row.text("answer")
        name, extra = row.text("question_id"), {"ques_type": kind}
        if kind == "fill_in_blank":
            question = f"{_STATEMENT}Question: {asked}.\n{_SHORT}"
            return Example(name, row.picture("query_image"), question, (answer,), answer, extra=extra)
        if kind == "choose_img":
            given = [column for column in _CHOICES if row.values.get(column) is not None]
            choices = tuple(f"The {ordinal} image." for ordinal in _ORDINALS[: len(given)])
            letter = row.choice(choices, given.index(_column(answer)) if _column(answer) in given else -1)
            sheet = _Sheet(row.picture("query_image"), tuple(map(row.picture, given)))
            picture: Callable[[], Image.Image] = sheet
        elif kind == "choose_txt":
            choices = _options(row.text("choices"), answer.strip())
            letter = row.choice(choices, choices.index(answer.strip()) if answer.strip() in choices else -1)
            picture = row.picture("query_image")
        else:
            raise row.error(f"ques_type must be fill_in_blank, choose_img or choose_txt, got {kind!r}")
        question = f"{_STATEMENT}Question: {asked}.\nOptions:\n{options(choices)}\n{_LETTER}"
        return Example(name, picture, question, (letter,), letter, choices, extra)

    def rows(self, folder: Path, split: str) -> Sequence[Mapping[str, Any]]:
        files = sorted(folder.glob(self.pattern(split)))
        given = [column for column in _CHOICES if files and column in columns_of(self.title, files[0])]
        table = read_parquet(self.title, folder, self.pattern(split), (*self.columns, *given))
        there = {column: table.data.column(column).is_valid().to_pylist() for column in given}
        pairs = enumerate(zip(table["ques_type"], table["answer"], strict=True))
        kept = [i for i, (kind, answer) in pairs if kind != "choose_img" or there.get(_column(answer), {i: False})[i]]
        if not kept:
            raise DataError(f"{self.title}: split {split} has no question whose right picture is there")
        return table.select(kept)

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"question_id": text, "question": text, "choices": text, "answer": text, "query_image": PICTURE,
                "choice_image_0": PICTURE, "choice_image_1": PICTURE, "ques_type": text, "label": text,
                "grade": text, "skills": text}  # fmt: skip

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing, kind = draw(rng), ("choose_txt", "fill_in_blank", "choose_img")[index % 3]
        row = {"question_id": str(index), "query_image": drawing.stored, "choice_image_0": None,
               "choice_image_1": None, "ques_type": kind, "label": "S2", "grade": "grade1",
               "skills": "geometry"}  # fmt: skip
        if kind == "fill_in_blank":
            return row | {"question": "How many shapes are there", "choices": "", "answer": "1"}
        if kind == "choose_txt":
            names, _ = options_with(drawing.shape, rng, SHAPES)
            return row | {"question": "Which shape is this", "choices": ",".join(names), "answer": drawing.shape}
        other = draw(rng)
        while other.colour == drawing.colour:
            other = draw(rng)
        at = int(rng.integers(2))
        images = [drawing.stored, other.stored] if at == 0 else [other.stored, drawing.stored]
        return row | {"question": "Which image shows the same shape", "choices": "choice_0.png,choice_1.png",
                      "answer": f"choice_{at}.png", "choice_image_0": images[0],
                      "choice_image_1": images[1]}  # fmt: skip


def _options(choices: str, answer: str) -> tuple[str, ...]:
    """The texts between commas; the answer is one of them though it has commas of its own, as 1,000 does."""
    parts = tuple(choice.strip() for choice in choices.split(","))
    before, found, after = f",{choices},".partition(f",{answer},")
    if answer in parts or not found:
        return parts
    sides = [[choice.strip() for choice in side.split(",") if choice.strip()] for side in (before, after)]
    return (*sides[0], answer, *sides[1])


def _column(answer: str | None) -> str:
    """Column of the picture that the answer `choice_<i>.png` names."""
    return (answer or "").replace("choice_", "choice_image_").removesuffix(".png")

"""MMBench (Liu et al. 2023, arXiv 2307.06281): each question returns with its options rotated."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np

from reproductions.paper.data.dataset import DataSet, Split
from reproductions.paper.data.examples import Example
from reproductions.paper.data.parquet import PICTURE, columns_of, read_parquet
from reproductions.paper.data.prompts import LETTER, options
from reproductions.paper.data.rows import Row
from reproductions.paper.data.shapes import draw, options_with

_OPTIONS, _FIFTH = ("A", "B", "C", "D"), "E"
ROTATION = 1_000_000
"""Rotations of one question have the same index modulo this."""


@dataclass(frozen=True)
class MMBench(DataSet):
    name = "mmbench"
    title = "MMBench"
    repository = "{organisation}/MMBench"
    folder = "en"
    metric = "mmbench"
    splits: ClassVar = {"dev": Split(4_329, 0.1, 0.1)}
    evaluation = "dev"
    columns = ("index", "question", "hint", *_OPTIONS, "answer", "category", "image")
    answer_tokens = 256

    def example(self, row: Row) -> Example:
        given = [row.optional(letter) for letter in (*_OPTIONS, _FIFTH)]
        choices = tuple(choice for choice in given if choice)
        if given[: len(choices)] != list(choices):
            raise row.error(f"an option is missing between others: {given}")
        letter = row.text("answer").strip()
        row.choice(choices, "ABCDE".find(letter) if len(letter) == 1 else -1)
        hint = row.optional("hint")
        asked = f"{hint} {row.text('question')}" if hint else row.text("question")
        # The empty line is there in lmms-eval's prompt.
        question = f"{asked} There are several options:\n{options(choices)}\n{LETTER}"
        index = row.number("index")
        extra = {"group": index % ROTATION, "category": row.optional("category")}
        return Example(str(index), row.picture(), question, (letter,), letter, choices, extra)

    def rows(self, folder: Path, split: str) -> Sequence[Mapping[str, Any]]:
        """Not every release has a column for a fifth option."""
        files = sorted(folder.glob(self.pattern(split)))
        fifth = [_FIFTH] * bool(files and _FIFTH in columns_of(self.title, files[0]))
        return read_parquet(self.title, folder, self.pattern(split), (*self.columns, *fifth))

    def drawn(self, rows: Sequence[Mapping[str, Any]], limit: int, rng: np.random.Generator) -> list[int]:
        """Whole questions with all their rotations, as long as they have room; at least one."""
        groups: dict[int, list[int]] = {}
        column: Sequence[int] = rows["index"]  # type: ignore[call-overload]
        for place, index in enumerate(column):
            groups.setdefault(int(index) % ROTATION, []).append(place)
        order = [list(groups.values())[int(i)] for i in rng.permutation(len(groups))]
        found = list(order[0])
        for group in order[1:]:
            found += group if len(found) + len(group) <= limit else []
        return found

    def features(self) -> dict[str, Any]:
        text = datasets.Value("string")
        return {"index": datasets.Value("int64"), "question": text, "hint": text, "answer": text,
                **dict.fromkeys(_OPTIONS, text), "category": text, "image": PICTURE, "source": text,
                "L2-category": text, "comment": text, "split": text}  # fmt: skip

    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        drawing = draw(rng)
        names, answer = options_with(drawing.colour, rng)
        return {"index": index, "question": "Which colour is the shape?",
                "hint": "nan" if index % 2 else "Look at the picture.", "answer": _OPTIONS[answer],
                **dict(zip(_OPTIONS, names, strict=True)), "category": "attribute_recognition",
                "image": drawing.stored, "source": "drawn", "L2-category": "finegrained_perception",
                "comment": "nan", "split": "dev"}  # fmt: skip

    def sample_rows(self, split: str, n: int, seed: int) -> Iterator[dict[str, Any]]:
        """Each question twice, the second time with its options rotated by one."""
        rows = super().sample_rows(split, -(-n // 2), seed)
        return islice(chain.from_iterable((row, _rotated(row)) for row in rows), n)


def _rotated(row: dict[str, Any]) -> dict[str, Any]:
    moved = {letter: row[_OPTIONS[i - 1]] for i, letter in enumerate(_OPTIONS)}
    answer = _OPTIONS[(_OPTIONS.index(row["answer"]) + 1) % len(_OPTIONS)]
    return {**row, **moved, "index": row["index"] + ROTATION, "answer": answer}

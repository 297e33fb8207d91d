"""One row of a data set: typed access to its columns, with errors that name the data set and the row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from reproductions.paper.data.examples import DataError

ANNOTATORS = 2
"""VQA accuracy leaves out one annotator at a time: so many have to have answered."""


@dataclass(frozen=True)
class Row:
    """A row, and where it stands.

    Attributes:
        data: title of the data set.
        split: name of the split.
        index: position of the row in the split, from 0.
        values: column name -> value; pictures as stored, `{"bytes": ..., "path": ...}`.
    """

    data: str
    split: str
    index: int
    values: Mapping[str, Any] = field(repr=False)

    def error(self, message: str) -> DataError:
        """The error to raise for this row."""
        return DataError(f"{self.data}, split {self.split}, row {self.index}: {message}")

    def text(self, column: str) -> str:
        """A text or a number as text.

        Raises:
            DataError: it is missing.
        """
        value = self.values.get(column)
        if value is None:
            raise self.error(f"column {column!r} is missing or empty")
        return str(value)

    def optional(self, column: str) -> str:
        """A text, "" where there is none; "nan" is how some sets write none."""
        value = self.values.get(column)
        return "" if value is None or str(value) == "nan" else str(value)

    def texts(self, column: str, least: int = 1) -> tuple[str, ...]:
        """A list of texts.

        Raises:
            DataError: it is missing or has fewer entries than ``least``.
        """
        values = self.values.get(column)
        if not isinstance(values, list | tuple) or len(values) < least or any(value is None for value in values):
            count = "one entry" if least == 1 else f"{least} entries"
            raise self.error(f"column {column!r} must be a list with at least {count}, got {values!r}")
        return tuple(map(str, values))

    def number(self, column: str) -> int:
        """A whole number.

        Raises:
            DataError: it is missing, or is not one.
        """
        try:
            return int(self.text(column))
        except ValueError as error:
            raise self.error(f"column {column!r} must be a whole number, got {self.values.get(column)!r}") from error

    def choice(self, choices: tuple[str, ...], chosen: int) -> str:
        """Letter of the chosen option.

        Raises:
            DataError: there is no such option.
        """
        if not 0 <= chosen < len(choices):
            raise self.error(f"the answer is none of the {len(choices)} options: {chosen}, counted from 0")
        return chr(ord("A") + chosen)

    def picture(self, column: str = "image") -> Callable[[], Image.Image]:
        """What decodes the picture of a column to RGB.

        Raises:
            DataError: the row has no picture there; the returned function raises it where the picture is broken.
        """
        stored = self.values.get(column)
        if not isinstance(stored, Mapping) or not (stored.get("bytes") or stored.get("path")):
            raise self.error(f"column {column!r} holds no picture")
        return Picture(self, column)


@dataclass(frozen=True)
class Picture:
    """Decodes a stored picture when it is called; a class, so that examples can be sent to worker processes."""

    row: Row
    column: str

    def __call__(self) -> Image.Image:
        stored = self.row.values[self.column]
        try:
            content = stored.get("bytes") or Path(stored["path"]).read_bytes()
            image: Image.Image = Image.open(BytesIO(content))
            # Pillow cuts 16 bits off at 255, which leaves a picture white.
            image = image.point(lambda value: value / 256).convert("L") if image.mode.startswith("I") else image
            return image.convert("RGB")
        # Pillow raises many kinds of errors, SyntaxError among them, for a broken file.
        except Exception as error:
            why = "it is of no kind that is known" if isinstance(error, UnidentifiedImageError) else error
            raise self.row.error(f"column {self.column!r} holds a broken picture: {why}") from error

"""Small drawings for sample files: one coloured shape on white."""

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 200, 40)}
SHAPES = ("circle", "square", "triangle")
SIDE = 56


@dataclass(frozen=True)
class Drawing:
    """A drawn shape: what it shows, and the encoded picture."""

    colour: str
    shape: str
    png: bytes

    @property
    def stored(self) -> dict[str, Any]:
        """The picture as a parquet file of the hub holds it."""
        return {"bytes": self.png, "path": None}

    @property
    def text(self) -> str:
        """Such as "red circle"."""
        return f"{self.colour} {self.shape}"


def draw(rng: np.random.Generator) -> Drawing:
    """Draw a shape at random: colour, form, size and place."""
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    size = int(rng.integers(24, 41))
    left, top = (int(rng.integers(0, SIDE - size)) for _ in range(2))
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen, box = ImageDraw.Draw(image), (left, top, left + size, top + size)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        corners = [(left, top + size), (left + size, top + size), (left + size // 2, top)]
        pen.polygon(corners, fill=COLOURS[colour])
    file = BytesIO()
    image.save(file, "PNG")
    return Drawing(colour, shape, file.getvalue())


def options_with(
    answer: str, rng: np.random.Generator, among: tuple[str, ...] = tuple(COLOURS)
) -> tuple[list[str], int]:
    """The names of `among` in random order, and where `answer` stands."""
    names = [str(name) for name in rng.permutation(among)]
    return names, names.index(answer)

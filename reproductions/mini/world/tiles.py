"""Coloured shapes on a dark board: a target whose pictures and counts are unlike anything of pre-training."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from reproductions.mini.world.pictures import SIZE
from reproductions.mini.world.questions import NUMBERS, Turn
from reproductions.mini.world.scenes import Split, split_of

SIDE = 4
"""Tiles in a row, and rows."""

MOST = 5
"""The most tiles of the colour that is asked for, and the most of all others."""

_TILE = SIZE // SIDE
_BOARD = (35, 35, 45)
_PAINT = {"red": (230, 40, 40), "green": (40, 190, 60), "blue": (60, 90, 240), "yellow": (245, 215, 40)}
_SHAPES = ("square", "disc", "triangle")

PAINTS: tuple[str, ...] = tuple(_PAINT)
COUNTS: tuple[str, ...] = NUMBERS[: MOST + 1]


@dataclass(frozen=True)
class Tiles:
    """The colour of each of the 4 x 4 places, row by row, or "" for none; and the colour that is asked for."""

    colours: tuple[str, ...]
    asked: str

    @property
    def split(self) -> Split:
        """The split that owns this board, by a hash of its colours."""
        return split_of(" ".join(self.colours))


def draw_board(rng: np.random.Generator, split: Split) -> Tiles:
    """Draw a board of `split`: zero to five tiles of one colour, and as many of the others together."""
    while True:
        asked = str(rng.choice(PAINTS))
        others = [paint for paint in PAINTS if paint != asked]
        count, rest = (int(n) for n in rng.integers(0, MOST + 1, 2))
        colours = [asked] * count + [str(rng.choice(others)) for _ in range(rest)]
        colours += [""] * (SIDE**2 - len(colours))
        board = Tiles(tuple(str(colours[i]) for i in rng.permutation(SIDE**2)), asked)
        if board.split == split:
            return board


def draw_tiles(board: Tiles, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw each tile as a square, a disc or a triangle, 8 to 10 pixels wide: uint8 (3, 48, 48)."""
    image = Image.new("RGB", (SIZE, SIZE), _BOARD)
    pen = ImageDraw.Draw(image)
    for place, colour in enumerate(board.colours):
        if colour:
            side, shape = int(rng.integers(8, 11)), str(rng.choice(_SHAPES))
            left, top = (n * _TILE + (_TILE - side) // 2 for n in (place % SIDE, place // SIDE))
            right, bottom = left + side - 1, top + side - 1
            if shape == "square":
                pen.rectangle((left, top, right, bottom), _PAINT[colour])
            elif shape == "disc":
                pen.ellipse((left, top, right, bottom), _PAINT[colour])
            else:
                pen.polygon([(left, bottom), ((left + right) / 2, top), (right, bottom)], _PAINT[colour])
    return np.asarray(image).transpose(2, 0, 1).copy()


def ask_tiles(board: Tiles) -> Turn:
    """How many tiles have the colour that is asked for."""
    return f"how many {board.asked} things are shown ?", NUMBERS[board.colours.count(board.asked)]

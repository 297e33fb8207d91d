"""Pictures that are drawn, and questions whose answers are known because they were: no data to download."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from torch_mdgd.checks import require_whole
from torch_mdgd.report.probes import Probe, pillow

SIDE = 224
"""Of a picture, in pixels."""
FINER = 3
"""How much larger it is drawn, so that its edges are smooth."""
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 90, 200),
    "yellow": (245, 205, 40),
    "purple": (130, 60, 170),
    "black": (25, 25, 25),
}
GROUNDS = {"white": (250, 250, 250), "grey": (185, 185, 185), "pink": (250, 200, 215), "orange": (250, 175, 90)}
SHAPES = ("circle", "square", "triangle", "star")
NUMBERS = ("one", "two", "three", "four", "five")
SIDES = ("left", "right")

Thing = tuple[str, str, float, float, float]
"""A shape, its colour, the place of its centre and its radius, both in sides of the picture."""
Drawn = tuple[str, Sequence[Thing], str, str, tuple[str, ...]]
"""The ground, the things on it, question, answer and choices."""


def drawn_probes(per_task: int = 16, seed: int = 0) -> list[Probe]:
    """Five tasks, each about simple pictures: shape, colour, count, position and background.

    Within a task, each answer is right equally often, as far as the count allows. The same arguments give the same
    pictures.

    Args:
        per_task: probes of each task.
        seed: of the draw.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: ``per_task`` is no whole number of at least 1.
    """
    require_whole("per_task", per_task)
    probes = []
    for task, draw in TASKS.items():
        source = random.Random(f"{seed} {task}")
        for i in range(per_task):
            ground, things, question, answer, choices = draw(source, i)
            asked = f"{question} Answer with one word: {', '.join(choices[:-1])} or {choices[-1]}."
            probes.append(Probe(picture(ground, things), asked, answer, choices, task))
    return probes


def picture(ground: str, things: Sequence[Thing]) -> Any:
    """An RGB image of Pillow, 224 × 224.

    Args:
        ground: a name of ``GROUNDS``.
        things: what is drawn on it.
    """
    from PIL import ImageDraw

    large = SIDE * FINER
    image = pillow().new("RGB", (large, large), GROUNDS[ground])
    pen = ImageDraw.Draw(image)
    for shape, colour, x, y, radius in things:
        points = [(large * (x + radius * a), large * (y + radius * b)) for a, b in OUTLINES[shape]]
        if shape == "circle":
            pen.ellipse([*points[0], *points[1]], fill=COLOURS[colour])
        else:
            pen.polygon(points, fill=COLOURS[colour])
    return image.resize((SIDE, SIDE), pillow().Resampling.LANCZOS)


def _star() -> list[tuple[float, float]]:
    angles = [(math.pi * i / 5, 1.0 if i % 2 == 0 else 0.42) for i in range(10)]
    return [(length * math.sin(angle), -length * math.cos(angle)) for angle, length in angles]


# For a radius of 1; of a circle, the corners of its box.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(-0.9, -0.9), (0.9, 0.9)],
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
    "star": _star(),
}


def _shape(source: random.Random, i: int) -> Drawn:
    answer = SHAPES[i % len(SHAPES)]
    thing = (answer, source.choice(list(COLOURS)), *_near(source, 0.5, 0.5, 0.1), source.uniform(0.2, 0.35))
    return source.choice(list(GROUNDS)), [thing], "Which shape is in the picture?", answer, SHAPES


def _colour(source: random.Random, i: int) -> Drawn:
    names = tuple(COLOURS)
    answer, shape = names[i % len(names)], source.choice(SHAPES)
    thing = (shape, answer, *_near(source, 0.5, 0.5, 0.1), source.uniform(0.2, 0.35))
    return source.choice(list(GROUNDS)), [thing], f"What colour is the {shape}?", answer, names


def _count(source: random.Random, i: int) -> Drawn:
    number, shape = i % len(NUMBERS), source.choice(SHAPES)
    cells = source.sample([(x, y) for x in range(3) for y in range(3)], number + 1)
    places = [_near(source, (x + 0.5) / 3, (y + 0.5) / 3, 0.02) for x, y in cells]
    things = [(shape, source.choice(list(COLOURS)), x, y, source.uniform(0.1, 0.14)) for x, y in places]
    plural = f"{shape}s"
    return source.choice(list(GROUNDS)), things, f"How many {plural} are there?", NUMBERS[number], NUMBERS


def _position(source: random.Random, i: int) -> Drawn:
    side = i % 2
    one, other = source.sample(SHAPES, 2)
    middles = (0.27, 0.73) if side == 0 else (0.73, 0.27)
    things = [
        (shape, source.choice(list(COLOURS)), *_near(source, middle, 0.5, 0.04), source.uniform(0.15, 0.2))
        for shape, middle in zip((one, other), middles, strict=True)
    ]
    question = f"On which side of the {other} is the {one}?"
    return source.choice(list(GROUNDS)), things, question, SIDES[side], SIDES


def _background(source: random.Random, i: int) -> Drawn:
    names = tuple(GROUNDS)
    thing = (source.choice(SHAPES), source.choice(list(COLOURS)), *_near(source, 0.5, 0.5, 0.1), 0.25)
    return names[i % len(names)], [thing], "What colour is the background?", names[i % len(names)], names


def _near(source: random.Random, x: float, y: float, most: float) -> tuple[float, float]:
    return x + source.uniform(-most, most), y + source.uniform(-most, most)


TASKS: dict[str, Callable[[random.Random, int], Drawn]] = {
    "shape": _shape,
    "colour": _colour,
    "count": _count,
    "position": _position,
    "background": _background,
}

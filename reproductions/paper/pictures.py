"""Thumbnails of evaluated examples, kept with the results so that a report can show them."""

from collections.abc import Sequence
from pathlib import Path

from reproductions.paper.data.examples import Example

KEPT = 12
"""Examples of each task that have a thumbnail."""

SIDE = 160
"""Longest side in pixels."""


def save_pictures(examples: Sequence[Example], folder: Path) -> None:
    """Write the pictures of the first `KEPT` examples to `<folder>/<index>.jpg`, unless they are there.

    Args:
        examples: of one task, in the order of its predictions.
        folder: `evaluation/<task>.pictures` of a run; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(min(KEPT, len(examples))):
        path = folder / f"{i}.jpg"
        if not path.exists():
            image = examples[i].image
            image.thumbnail((SIDE, SIDE))
            image.save(path, quality=80)

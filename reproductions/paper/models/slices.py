"""How MiniCPM-V 2 cuts a large picture: an overview, and a grid of slices at full resolution (Yao et al. 2024, 3.2)."""

import math
from dataclasses import dataclass
from typing import Any

from PIL.Image import Resampling

Size = tuple[int, int]


@dataclass(frozen=True)
class SliceSettings:
    """What a picture is cut to.

    Attributes:
        most: slices at most.
        resolution: side of the square whose area a slice is given.
        patch: sides are multiples of this.
    """

    most: int
    resolution: int
    patch: int


def cut(image: Any, settings: SliceSettings) -> tuple[list[Any], Size | None]:
    """The overview and then the slices, row by row; and the grid (columns, rows), None for a picture left whole."""
    count = min(math.ceil(image.width * image.height / settings.resolution**2), settings.most)
    if count <= 1:
        return [image.resize(fitted(image.size, settings, enlarge=True), Resampling.BICUBIC)], None
    overview = image.resize(fitted(image.size, settings, enlarge=False), Resampling.BICUBIC)
    columns, rows = best_grid(image.size, count, settings.most)
    slice_size = (max(round(image.width / columns), 1), max(round(image.height / rows), 1))
    width, height = fitted(slice_size, settings, enlarge=True)
    whole = image.resize((width * columns, height * rows), Resampling.BICUBIC)
    corners = [(x * width, y * height) for y in range(rows) for x in range(columns)]
    return [overview, *(whole.crop((x, y, x + width, y + height)) for x, y in corners)], (columns, rows)


def best_grid(size: Size, count: int, most: int) -> Size:
    """Of all grids of about so many slices, the one whose slices are nearest to squares."""
    wanted = math.log(size[0] / size[1])
    counts = [n for n in (count - 1, count, count + 1) if 1 < n <= most]
    grids = [(columns, n // columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
    return min(grids, key=lambda grid: abs(wanted - math.log(grid[0] / grid[1])))


def fitted(size: Size, settings: SliceSettings, *, enlarge: bool) -> Size:
    """The size at the same shape, about ``resolution``² pixels if it is larger or may grow, in whole patches."""
    width, height = size
    if width * height > settings.resolution**2 or enlarge:
        shape = width / height
        height = int(settings.resolution / math.sqrt(shape))
        width = int(height * shape)
    patch = settings.patch
    return max(round(width / patch) * patch, patch), max(round(height / patch) * patch, patch)

"""``python -m benchmarks compare FIRST SECOND``: does a second run agree with the first within the first's quartiles?

Both are folders that ``python -m benchmarks --out FOLDER`` has written. Every cell with quartiles that both have is
held: it agrees if the second median lies between the first run's quartiles.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.timing import Ratio, digits

CELL = re.compile(r"([\d.,]+) \(([\d.,]+)–([\d.,]+)\)")


class Place(NamedTuple):
    """Where a cell stands."""

    page: str
    title: str
    row: str
    column: str


def cells(folder: Path) -> dict[Place, Ratio]:
    """All cells with quartiles in the pages of a folder.

    Raises:
        ValueError: there is none.
    """
    found = dict(cell for page in sorted(folder.glob("*.md")) for cell in _of_page(page))
    if not found:
        raise ValueError(f"{folder} has no page of the benchmarks with quartiles in it")
    return found


def _of_page(page: Path) -> Iterator[tuple[Place, Ratio]]:
    title, columns = "", [""]
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            title, columns = line[3:], []
        elif line.startswith("| "):
            row = [cell.strip() for cell in line.strip("|").split("|")]
            columns = columns or row
            for column, cell in zip(columns, row, strict=True):
                if match := CELL.fullmatch(cell):
                    yield (
                        Place(page.stem, title, row[0], column),
                        Ratio(*(float(x.replace(",", "")) for x in match.groups())),
                    )


def main(arguments: list[str] | None = None) -> int:
    """Print what does not agree, and how much does; 1 if anything does not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args(arguments)
    try:
        first, second = cells(options.first), cells(options.second)
    except ValueError as error:
        parser.error(str(error))
    both = [place for place in first if place in second]
    if not both:
        parser.error("the two runs have no cell in common: were the same benchmarks run on the same threads?")
    outside = [place for place in both if not first[place].low <= second[place].median <= first[place].high]
    for place in outside:
        print(f"{' · '.join(place)}: {first[place]}, then {digits(second[place].median)}")
    print(f"{len(both) - len(outside)} of {len(both)} medians lie within the first run's quartiles")
    return int(bool(outside))

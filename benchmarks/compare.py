"""``python -m benchmarks compare FIRST SECOND``: do two runs agree?

Both are folders that ``python -m benchmarks --out FOLDER`` has written. Every cell with quartiles that both have is
held to its twin. They agree if one's median lies between the other's quartiles; they are near if the quartiles overlap
at least, as the medians of two samples often do by chance; they disagree if one run's upper quartile lies below the
other's lower one.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.timing import Ratio

CELL = re.compile(r"(-?[\d.,]+) \((-?[\d.,]+)–(-?[\d.,]+)\)")
AGREE, NEAR, DISAGREE = "agree", "near", "disagree"
PAGE = "second.md"


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
    for title, row in tables(page):
        name, *others = row.items()
        for column, cell in others:
            if match := CELL.fullmatch(cell):
                numbers = (float(x.replace(",", "")) for x in match.groups())
                yield Place(page.stem, title, name[1], column), Ratio(*numbers)


def tables(page: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The heading and the cells, by column, of each row of a page's tables."""
    title, columns = "", list[str]()
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            title, columns = line[3:], []
        elif line.startswith("| "):
            row = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
            if columns and not row[0].startswith(":--"):
                yield title, dict(zip(columns, row, strict=True))
            columns = columns or row


def verdict(first: Ratio, second: Ratio) -> str:
    """Of two cells; the order does not matter."""
    if first.low <= second.median <= first.high or second.low <= first.median <= second.high:
        return AGREE
    return NEAR if first.low <= second.high and second.low <= first.high else DISAGREE


def report(first: dict[Place, Ratio], second: dict[Place, Ratio]) -> tuple[list[str], Counter[str]]:
    """A line for each cell of both, page by page, and how often each verdict fell."""
    lines, verdicts, page = [], Counter[str](), ""
    for place in (place for place in first if place in second):
        found = verdict(first[place], second[place])
        verdicts[found] += 1
        if place.page != page:
            page = place.page
            lines += ["", f"## {page}", "", "| | first | second | |", "| :-- | --: | --: | :-- |"]
        shown = f"**{found}**" if found == DISAGREE else found
        lines.append(f"| {' · '.join(place[1:])} | {first[place]} | {second[place]} | {shown} |")
    return lines, verdicts


def main(arguments: list[str] | None = None) -> int:
    """Print a verdict for each cell, and how much agrees; 1 if anything disagrees."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--save", action="store_true", help=f"write what is printed to FIRST/{PAGE} too")
    options = parser.parse_args(arguments)
    try:
        lines, verdicts = report(cells(options.first), cells(options.second))
    except ValueError as error:
        parser.error(str(error))
    if not verdicts:
        parser.error("the two runs have no cell in common: were the same benchmarks run on the same threads?")
    told = (
        f"Of {verdicts.total()} cells {verdicts[AGREE]} agree: one run's median lies between the other's quartiles. "
        f"Of {verdicts[NEAR]} the quartiles overlap, and {verdicts[DISAGREE]} disagree."
    )
    text = "\n".join(["# A second run", "", told, *lines])
    print(text)
    if options.save:
        (options.first / PAGE).write_text(text + "\n", encoding="utf-8")
    return int(bool(verdicts[DISAGREE]))

"""``python -m benchmarks goals``: goals beside what was reached, from the pages in ``benchmarks/results``.

It prints them as one table and writes it into ``benchmarks/README.md``, between the two marks there.
"""

import argparse
from pathlib import Path

from benchmarks.compare import PAGE, tables

RUN = "run.md"
HERE = Path(__file__).parent
BEGIN, END = "<!-- python -m benchmarks goals -->", "<!-- the end of it -->"
COLUMNS = ("what", "goal", "reached", "", "why not")


def goals(folder: Path) -> str:
    """The goals of all pages, those of one machine together, and what is said of the run and of a second one.

    Pages of GPUs stand alone: each has one device's goals.

    Raises:
        ValueError: there is none.
    """
    by_machine: dict[str, list[str]] = {}
    for page in sorted(page for page in folder.glob("*.md") if not page.stem.startswith("gpu-")):
        for title, row in tables(page):
            if title == "Goals":
                cells = [row.get(column, "") for column in COLUMNS]
                shown = f"| [{page.stem}]({folder.name}/{page.name}) | {' | '.join(cells)} |"
                by_machine.setdefault(_machine(page), []).append(shown)
    if not by_machine:
        raise ValueError(f"{folder} has no page of the benchmarks with goals in it")
    lines: list[str] = []
    for machine, rows in by_machine.items():
        head = ["| page | " + " | ".join(COLUMNS) + " |", "| :-- | :-- | --: | --: | :-- | :-- |"]
        lines += [machine, "", *head, *rows, ""]
    for name, missing in ((RUN, "Not measured: all pages in one run."), (PAGE, "Not measured: a second run.")):
        if (folder / name).exists():
            told = (folder / name).read_text(encoding="utf-8").splitlines()[2]
            lines += [f"[{name.removesuffix('.md').capitalize()}]({folder.name}/{name}): {told}", ""]
        else:
            lines += [missing, ""]
    return "\n".join(lines).strip()


def _machine(page: Path) -> str:
    found = (x for x in page.read_text(encoding="utf-8").splitlines() if x.startswith("torch ") and "peers: " in x)
    return next(found, "On an unknown machine.")


def put(text: str, into: str) -> str:
    """The page with this between its marks."""
    before, rest = into.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks goals", description=__doc__)
    parser.parse_args(arguments)
    page = HERE / "README.md"
    found = goals(HERE / "results")
    print(found)
    page.write_text(put(found, page.read_text(encoding="utf-8")), encoding="utf-8")

"""Results in files of JSON lines. A kill costs at most the line that was being written."""

import json
import os
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def read_lines(path: Path) -> list[Result]:
    """All whole lines of a file, also behind one that a kill cut short; none where there is no file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def read_results(path: Path) -> dict[str, Result]:
    """The lines of a file, each by its "key"."""
    return {result["key"]: result for result in read_lines(path)}


def add_line(path: Path, result: Result) -> None:
    """Append a line. One that a kill has cut short is closed first, so that the new one does not become part of it."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(result).encode() + b"\n")

"""Files that a kill leaves whole: replaced at once, or read up to where writing stopped."""

import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, text: str) -> None:
    """Replace a file's contents, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_lines(path: Path) -> list[Any]:
    """The lines of a file of JSON lines; a last one cut short by a kill is left out."""
    found = []
    # Answers may hold what str.splitlines takes for the end of a line, such as U+2028.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found

"""Files that a kill leaves whole: replaced at once, or read up to where writing stopped."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write(path: Path, text: str) -> None:
    """Replace a file's contents, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_until_cut(path: Path) -> list[Any]:
    """The lines of a file of JSON lines up to the first that a kill cut short: who goes on, goes on from there."""
    found = []
    # Answers may hold what str.splitlines takes for the end of a line, such as U+2028.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


class FileError(ValueError):
    """A file that cannot be read; the message names it and says what to do."""


@contextmanager
def named(path: Path, kind: str) -> Iterator[None]:
    """Errors of reading a file that is there name it, whatever library reads it.

    Args:
        path: of the file.
        kind: what it should be, such as "a JSON file".

    Raises:
        FileError: in place of any error but that of a missing file.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    # Each library that reads files raises errors of its own kinds.
    except Exception as error:
        raise FileError(f"{path} is not {kind} ({error}): remove it and call again") from error


def read_json(path: Path, *keys: str) -> Any:
    """What a file of JSON holds.

    Args:
        path: of the file.
        keys: that it has to have.

    Raises:
        FileError: it is broken, or lacks one.
    """
    with named(path, f"a JSON file with {' and '.join(keys)}" if keys else "a JSON file"):
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            found[key]
        return found


class BusyError(RuntimeError):
    """Another process works in a folder; the message names it."""


@contextmanager
def alone_in(folder: Path, name: str = "lock", *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder until this block ends, or this process by whatever death.

    Args:
        folder: that is there.
        name: of a file in it, for what of the folder is kept.
        wait: until another process has left.

    Raises:
        BusyError: another process is in it.
    """
    with (folder / name).open("w") as file:
        try:
            # Unlike flock, not handed on to worker processes, which outlive a killed one for seconds.
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Any other error is that of a file system without locks, on which nobody is kept out.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BusyError(f"{folder}: another process is at work here") from error
        yield

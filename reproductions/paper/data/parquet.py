"""Parquet files of a folder as rows that stay on disk."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reproductions.paper.data.examples import DataError

PICTURE = datasets.Image(decode=False)
"""A column of pictures, which stay encoded: `{"bytes": ..., "path": ...}`."""
_PART = re.compile(r"-(\d+)-of-(\d+)")
_THERE = {"bytes": b"not read", "path": None}


def read_parquet(title: str, folder: Path, pattern: str, columns: Sequence[str]) -> datasets.Dataset:
    """Read columns of the parquet files that match a pattern.

    Args:
        title: names the data set in errors.
        folder: where the files lie, in the layout of the hub's repository.
        pattern: such as "data/val-*.parquet".
        columns: those to read; others may be there.

    Returns:
        a memory-mapped data set; pictures stay encoded.

    Raises:
        DataError: no such folder, no such files, fewer than their names say, a file that is not parquet, a missing
            column, or no rows.
    """
    if not folder.is_dir():
        raise DataError(f"{title}: there is no folder {folder}")
    files = sorted(folder.glob(pattern))
    if not files:
        raise DataError(f"{title}: no file in {folder} matches {pattern}")
    _require_all_parts(title, folder, files)
    full = [str(file) for file in files if _rows(title, file, columns) > 0]
    if not full:
        raise DataError(f"{title}: {pattern} in {folder} has no rows")
    try:
        table = datasets.Dataset.from_parquet(full, columns=list(columns))
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(f"{title}: cannot read {pattern} in {folder}: {error.__cause__}") from error
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, PICTURE)
    return table


def without_pictures(rows: Sequence[Mapping[str, Any]], places: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    """The rows at some places; a stored picture's bytes are not read from disk, and something stands for them."""
    if not isinstance(rows, datasets.Dataset):
        yield from (rows[place] for place in places)
        return
    chosen = rows if len(places) == len(rows) else rows.select(places)
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    there = {name: _not_null(chosen.data.column(name)) for name in pictures}
    # Where a data set is a selection, its table still holds all rows.
    stored = range(len(chosen)) if chosen._indices is None else chosen._indices.column(0).to_pylist()
    for place, row in zip(stored, chosen.remove_columns(pictures), strict=True):
        yield {**row, **{name: _THERE if there[name][place] else None for name in pictures}}


def _not_null(pictures: pa.ChunkedArray) -> list[bool]:
    """Whether each picture has bytes or a path."""
    parts = [pc.is_valid(pc.struct_field(pictures, name)) for name in _THERE]
    found: list[bool] = pc.and_(pc.is_valid(pictures), pc.or_(*parts)).to_pylist()
    return found


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], features: Mapping[str, Any]) -> None:
    """Write rows with the given features to one file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list([dict(row) for row in rows], datasets.Features(features)).to_parquet(str(path))


def columns_of(title: str, file: Path) -> list[str]:
    """Names of a file's columns.

    Raises:
        DataError: it is not a parquet file.
    """
    return list(_metadata(title, file).schema.to_arrow_schema().names)


def _require_all_parts(title: str, folder: Path, files: Sequence[Path]) -> None:
    """Files named `test-00000-of-00009` are nine: of a copy that broke off rows would be missing silently.

    Raises:
        DataError: one is missing, or there twice, as where two versions lie in one folder.
    """
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for file in files:
        if found := _PART.search(file.name):
            parts[file.name[: found.start()]].append((int(found[1]), int(found[2])))
    for name, some in parts.items():
        if sorted(some) != [(i, some[0][1]) for i in range(some[0][1])]:
            numbers = ", ".join(f"{i} of {n}" for i, n in sorted(some))
            raise DataError(
                f"{title}: {folder} does not hold each part of {name} once; parts are counted from 0, and there are "
                f"{numbers}"
            )


def _metadata(title: str, file: Path) -> Any:
    try:
        return pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{title}: {file} is not a parquet file: {error}") from error


def _rows(title: str, file: Path, columns: Sequence[str]) -> int:
    metadata = _metadata(title, file)
    found = metadata.schema.to_arrow_schema().names
    missing = [column for column in columns if column not in found]
    if missing:
        raise DataError(f"{title}: {file} has no column {', '.join(missing)}; it has {', '.join(found)}")
    return int(metadata.num_rows)

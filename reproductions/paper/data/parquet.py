"""Parquet files of a folder as rows that stay on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from reproductions.paper.data.examples import DataError

PICTURE = datasets.Image(decode=False)
"""A column of pictures, which stay encoded: `{"bytes": ..., "path": ...}`."""


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
        DataError: no such folder, no such files, a file that is not parquet, a missing column, or no rows.
    """
    if not folder.is_dir():
        raise DataError(f"{title}: there is no folder {folder}")
    files = sorted(folder.glob(pattern))
    if not files:
        raise DataError(f"{title}: no file in {folder} matches {pattern}")
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

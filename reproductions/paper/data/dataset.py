"""What every data set has: where it lies, its splits, how a row becomes an example, and how to make a sample file."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np

from reproductions.paper.data.examples import DataError, Example
from reproductions.paper.data.parquet import read_parquet, without_pictures, write_parquet
from reproductions.paper.data.rows import Row

ORGANISATIONS = ("lmms-lab-encoder", "lmms-lab")
"""Organisations on the hub that have copies of lmms-eval's sets: the new name and the old one, asked in this order."""

_SAMPLES = 1_200_000
"""More rows than a sample file has: keeps ids of splits apart."""


@dataclass(frozen=True)
class Split:
    """Size of a split: examples, gigabytes to download, and gigabytes of the copy that `datasets` makes of it.

    The copy holds a picture once for each question about it, where a parquet file holds it once: ten times the size
    and more. None where the copy is of the download's size, or none is made.
    """

    examples: int
    gigabytes: float
    copy: float | None = None

    @property
    def unpacked(self) -> float:
        """Gigabytes of the copy."""
        return self.gigabytes if self.copy is None else self.copy


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Rows of a split, read when they are asked for; can be sent to worker processes.

    Attributes:
        places: of the rows in the split.
    """

    data: "DataSet" = field(repr=False)
    split: str
    rows: Sequence[Mapping[str, Any]] = field(repr=False)
    places: Sequence[int] = field(repr=False)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = self.places[index]
        return self._read(place, self.rows[place])

    def require_whole(self) -> None:
        """Read every row once, but for the insides of pictures.

        Raises:
            DataError: one is broken, or has no picture.
        """
        for place, values in zip(self.places, without_pictures(self.rows, self.places), strict=True):
            self._read(place, values)

    def _read(self, place: int, values: Mapping[str, Any]) -> Example:
        return self.data.example(Row(self.data.title, self.split, place, values))


@dataclass(frozen=True)
class DataSet(ABC):
    """A data set; a subclass is one file, and its fields are the options that its prompts have.

    Attributes:
        name: what configurations call it.
        title: what tables and errors call it.
        repository: on the hub; "{organisation}" stands for one of `ORGANISATIONS`, or the argument of `load`.
        folder: of the repository that holds the files, which is the configuration's name where there are several.
        metric: name in `METRICS`.
        splits: sizes by name.
        evaluation: the split that the tables' numbers are measured on.
        training: the split to fine-tune on; None for sets that are only evaluated.
        validation: a split to choose settings by, whose examples the tables' numbers are not measured on; None for
            sets that have none.
        columns: those that `example` reads.
        answer_tokens: the longest answer that is asked for: lmms-eval's where it names one of at most 256, and else
            enough that no answer that counts is cut off.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    repository: ClassVar[str]
    folder: ClassVar[str] = "data"
    metric: ClassVar[str]
    splits: ClassVar[Mapping[str, Split]]
    evaluation: ClassVar[str]
    training: ClassVar[str | None] = None
    validation: ClassVar[str | None] = None
    columns: ClassVar[tuple[str, ...]]
    answer_tokens: ClassVar[int] = 128

    @abstractmethod
    def example(self, row: Row) -> Example:
        """Read one row.

        Raises:
            DataError: a value is missing or makes no sense.
        """

    @abstractmethod
    def features(self) -> dict[str, Any]:
        """Columns of a sample file and their `datasets` types, as the hub's copy has them."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        """A row for a sample file, about a drawing of `shapes.draw`."""

    def load(
        self,
        split: str,
        *,
        source: str | Path | None = None,
        limit: int | None = None,
        seed: int = 0,
        organisation: str = "",
        revision: str | None = None,
    ) -> Examples:
        """Open a split; pictures are decoded when they are looked at.

        Args:
            split: one of `splits`.
            source: folder in the layout of the hub's repository (`{folder}/{split}-*.parquet`), a clone of it for
                instance; by default the files of this split are fetched from the hub, once.
            limit: how many rows, drawn at random and in their own order; all by default.
            seed: draws them.
            organisation: whose copy on the hub; those of `ORGANISATIONS` if empty.
            revision: commit or branch of the repository on the hub; the newest if None.

        Raises:
            DataError: an unknown split, a file or a column that is missing, no rows, or a hub out of reach. A broken
                row raises it when it is read.
            ValueError: `limit` is not positive.
        """
        if split not in self.splits:
            raise DataError(f"{self.title}: split must be one of {', '.join(self.splits)}, got {split!r}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be positive, got {limit}")
        folder = self.fetch(split, organisation, revision) if source is None else Path(source)
        rows = self.rows(folder, split)
        if limit is None or limit >= len(rows):
            return Examples(self, split, rows, range(len(rows)))
        return Examples(self, split, rows, sorted(self.drawn(rows, limit, np.random.default_rng(seed))))

    def drawn(self, rows: Sequence[Mapping[str, Any]], limit: int, rng: np.random.Generator) -> list[int]:
        """Places of so many different rows."""
        return [int(i) for i in rng.choice(len(rows), limit, replace=False)]

    def rows(self, folder: Path, split: str) -> Sequence[Mapping[str, Any]]:
        """Rows of a split in a folder; at least one.

        Raises:
            DataError: they cannot be read.
        """
        return read_parquet(self.title, folder, self.pattern(split), self.columns)

    def holds(self, folder: Path, split: str) -> bool:
        """Whether a folder has files of a split."""
        return any(folder.glob(self.pattern(split)))

    def pattern(self, split: str) -> str:
        """Files of a split, below the folder."""
        return f"{self.folder}/{split}-*.parquet"

    def patterns(self, split: str) -> list[str]:
        """Everything that a split needs from the hub."""
        return [self.pattern(split)]

    def repositories(self, split: str, organisation: str) -> list[str]:
        """Where the hub has a split, in the order to ask."""
        names = [organisation] if organisation else ORGANISATIONS
        return list(dict.fromkeys(self.repository.format(organisation=name) for name in names))

    def fetch(self, split: str, organisation: str, revision: str | None = None) -> Path:
        """Bring the files of a split from the hub, or find them in its cache; the folder's name is the commit.

        Raises:
            DataError: they are not to be had.
        """
        from huggingface_hub import snapshot_download

        repositories = self.repositories(split, organisation)
        errors: list[Exception] = []
        for repository in repositories:
            try:
                return Path(
                    snapshot_download(
                        repository, repo_type="dataset", allow_patterns=self.patterns(split), revision=revision
                    )
                )
            # No network, no such repository and no permission are different errors, of several libraries.
            except Exception as error:
                errors.append(error)
        moved = " or, if it has moved, name whose copy to take (--set data.organisation=NAME)"
        raise DataError(
            f"{self.title}: could not fetch {' or '.join(repositories)} from the hub: {str(errors[0]).rstrip('.')}. "
            f"Pass a folder with its files (--data FOLDER, for FOLDER/{self.name}/{self.pattern(split)})"
            f"{moved * ('{organisation}' in self.repository)}."
        ) from errors[0]

    def write_sample(self, folder: Path, split: str, n: int, seed: int) -> None:
        """Write a small file in the data set's own schema, which `load(split, source=folder)` reads.

        The pictures are drawn, and what they show answers the questions. Splits of one folder may be written one after
        the other; the same arguments write the same file.

        Raises:
            DataError: an unknown split.
        """
        write_parquet(folder / self._file(split), list(self.sample_rows(split, n, seed)), self.features())

    def sample_rows(self, split: str, n: int, seed: int) -> Iterator[dict[str, Any]]:
        """The rows of a sample file; ids and pictures of the splits differ.

        Raises:
            DataError: an unknown split.
        """
        if split not in self.splits:
            raise DataError(f"{self.title}: split must be one of {', '.join(self.splits)}, got {split!r}")
        place = list(self.splits).index(split)
        rng = np.random.default_rng([seed, place, *self.name.encode()])
        for i in range(n):
            yield self.sample(rng, _SAMPLES * place + i)

    def with_options(self, **options: Any) -> "DataSet":
        """The same data set with other options, which are its fields."""
        return replace(self, **options)

    def _file(self, split: str) -> str:
        return self.pattern(split).replace("*", "00000-of-00001")

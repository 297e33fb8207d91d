"""Processes that prepare batches, and what they say when they cannot."""

from collections.abc import Iterator
from contextlib import contextmanager

from reproductions.paper.data import DataError


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """A data error says the same whether it came from this process or, wrapped in a traceback, from a worker."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error

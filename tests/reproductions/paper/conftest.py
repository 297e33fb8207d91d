"""Tiny models and sample files, written once."""

import pytest

from reproductions.paper.run.rows import _quiet
from reproductions.paper.run.smoke import Assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """A folder with a tiny model of each family and a sample of each data set."""
    _quiet()
    return Assets(tmp_path_factory.mktemp("assets")).write()

"""Tiny models and sample files, written once."""

import gc

import pytest

from reproductions.paper.run.rows import _quiet
from reproductions.paper.run.smoke import Assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """A folder with a tiny model of each family and a sample of each data set, written when asked for."""
    _quiet()
    # What was imported lives on; the collections after each training need not look through it.
    gc.freeze()
    return Assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def unmeasured(monkeypatch):
    """Rows leave out their evaluation, where a test is of what training leaves."""
    found = {"scores": {"score": 0.0}, "effective_rank": 1.0}
    monkeypatch.setattr("reproductions.paper.run.row.evaluate", lambda *arguments: found)

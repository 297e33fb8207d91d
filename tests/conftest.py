"""Settings that every test relies on: one thread, no network, hypothesis without a deadline."""

import gc
import os

# Before torch and transformers are imported; the processes that tests start inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import PurePath

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from torch_mdgd import kernels

torch.set_num_threads(1)

# On CI hypothesis derandomizes by itself, and this profile inherits that.
settings.register_profile("torch_mdgd", deadline=None, max_examples=30)
settings.load_profile("torch_mdgd")


def pytest_collection_finish():
    """Trainers collect garbage at the end of each run, and need not look through all that was imported."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    """What numba compiles it keeps on disk: once, before there are workers, who would all do it at the same time."""
    # Enough numbers for the compiled backend, where there is one.
    kernels.inner_products([[torch.ones(1 << 19)]])


class _Together(LoadScopeScheduling):
    """A file is one worker's, for its fixtures; and so are all tests of two processes, which share a pair."""

    def _split_scope(self, nodeid):
        path = PurePath(nodeid.partition("::")[0])
        return "two processes" if "distributed" in path.parts else str(path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """In place of --dist loadgroup, whose marks do not reach the scheduler with pytest 9.2 and xdist 3.8."""
    return _Together(config, log)

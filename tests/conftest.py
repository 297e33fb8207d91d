"""Settings that every test relies on: one thread, no network, hypothesis without a deadline."""

import os

# Before torch and transformers are imported; the processes that tests start inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# On CI hypothesis derandomizes by itself, and this profile inherits that.
settings.register_profile("torch_mdgd", deadline=None, max_examples=50)
settings.load_profile("torch_mdgd")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With several workers, a file is one worker's, for its fixtures; and so are all tests of two processes."""
    for item in items:
        together = "distributed" in item.path.parts
        item.add_marker(pytest.mark.xdist_group("two processes" if together else str(item.path)))

"""Settings that every test relies on: one thread, no network, hypothesis without a deadline."""

import os

# Before torch and transformers are imported; the processes that tests start inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import settings

torch.set_num_threads(1)

# On CI hypothesis derandomizes by itself, and this profile inherits that.
settings.register_profile("torch_mdgd", deadline=None, max_examples=50)
settings.load_profile("torch_mdgd")

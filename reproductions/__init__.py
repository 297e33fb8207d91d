"""The paper's experiments on top of `torch_mdgd`."""

import os

# Read when torch is loaded: its profiler otherwise announces every measurement of memory, between the progress bars.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

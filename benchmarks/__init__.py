"""What the library costs beside its peers: ``python -m benchmarks`` and ``pytest benchmarks``.

The unit of time is one copy of as many float32 values, ``out.copy_(x)``, timed in turn with what it is held against.
"""

import os

# Read when torch is loaded: its profiler otherwise announces every measurement of memory.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

"""accelerate keeps its settings for the whole process; a test begins and ends without any."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def fresh() -> Iterator[None]:
    reset()
    yield
    reset()


@contextmanager
def accelerators() -> Iterator[None]:
    """As on a machine with an accelerator for each process, which is the CPU: accelerate shards on these alone."""
    backend = mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.MULTI_GPU))
    with fresh(), backend, mock.patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": "cpu"}):
        yield

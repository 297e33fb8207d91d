"""accelerate keeps its settings for the whole process; a test begins and ends without any."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState, GradientState


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def fresh() -> Iterator[None]:
    reset()
    yield
    reset()

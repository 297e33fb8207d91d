import pytest

from benchmarks.setups import llava
from benchmarks.step import NAMES, contenders
from benchmarks.timing import COPY


@pytest.mark.parametrize("name", [COPY, *NAMES])
def test_step(race, divide: int, name: str) -> None:
    race("step", contenders(llava(divide), [name] if name != COPY else []), name)

import pytest

from benchmarks.shapes import combine_contenders, lists, mask_contenders
from benchmarks.timing import COPY

NAMES = [COPY, *lists(128)]


@pytest.mark.parametrize("name", NAMES)
def test_combine(race, divide: int, name: str) -> None:
    race("update of a list", combine_contenders(divide), name)


@pytest.mark.parametrize("name", NAMES)
def test_mask(race, divide: int, name: str) -> None:
    race("mask of a list", mask_contenders(divide), name)

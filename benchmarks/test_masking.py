import pytest

from benchmarks.masking import NAMES, contenders
from benchmarks.timing import COPY


@pytest.mark.parametrize("fraction", [0.01, 0.10, 0.50], ids="{:.0%}".format)
@pytest.mark.parametrize("name", [COPY, *NAMES])
def test_mask(race, values: int, fraction: float, name: str) -> None:
    race(f"mask, {fraction:.0%}", contenders(values, fraction, [name] if name != COPY else []), name)

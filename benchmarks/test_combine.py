import pytest
import torch

from benchmarks.combine import NAIVE, NAIVE_PROJECTION, NAMES, OURS, PROJECTION, contenders
from benchmarks.timing import COPY


@pytest.mark.parametrize("name", [COPY, *NAMES])
def test_float32(race, values: int, name: str) -> None:
    race("update, float32", contenders(values, torch.float32, [name] if name != COPY else []), name)


@pytest.mark.parametrize("name", [COPY, OURS, NAIVE, PROJECTION, NAIVE_PROJECTION])
def test_bfloat16(race, values: int, name: str) -> None:
    race("update, bfloat16", contenders(values, torch.bfloat16, [name] if name != COPY else []), name)

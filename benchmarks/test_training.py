from dataclasses import replace

import pytest

from benchmarks.methods import METHODS
from benchmarks.settings import QUICK
from benchmarks.training import contenders


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_training_step(race, request: pytest.FixtureRequest, method) -> None:
    settings = replace(QUICK, hidden=request.config.getoption("--hidden"), layers=2)
    race("training step", contenders(settings, [method]), method.name)

"""Options of ``pytest benchmarks``, and one way to time a contender in all suites."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from benchmarks.settings import M
from benchmarks.timing import threads


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("torch_mdgd benchmarks")
    group.addoption("--values", type=int, default=M, help="numbers in each vector (default: %(default)s)")
    group.addoption("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    group.addoption("--hidden", type=int, default=128, help="width of the trained model (default: %(default)s)")
    group.addoption("--divide", type=int, default=16, help="what LLaVA's widths are divided by (default: %(default)s)")


@pytest.fixture(autouse=True)
def fixed(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    with threads(request.config.getoption("--threads")):
        yield


@pytest.fixture
def values(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--values")


@pytest.fixture
def divide(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--divide")


@pytest.fixture
def race(benchmark, request: pytest.FixtureRequest):
    """Times the contender of a name; the group's ``copy`` is the unit that its other rows are to be held against."""

    def run(group: str, contenders, name: str) -> None:
        found = {c.name: c for c in contenders}
        if name not in found:
            pytest.skip(f"{name}: not installed")
        benchmark.group = group
        benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
        benchmark.pedantic(found[name].run, setup=found[name].prepare, rounds=7, warmup_rounds=1)

    return run

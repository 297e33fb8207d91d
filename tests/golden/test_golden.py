"""Every rule gives what it gave when the golden file was recorded, to the rounding of another processor.

What two processes gave is compared by tests/distributed/test_golden.py.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.golden import runs
from tests.properties import TOLERANCE

WANTED = load_file(Path(__file__).with_name("golden.safetensors"))


def recorded(in_two: bool):
    """By name, what one process left, or the first of two."""
    return {name: x for name, x in WANTED.items() if (name.split(" / ")[1] in ("ddp", "fsdp")) == in_two}


def assert_as_recorded(rule, found, wanted):
    for name in (name for name in wanted if name.startswith(f"{rule} / ")):
        x, y = found[name], wanted[name]
        assert x.dtype == y.dtype, name
        if x.is_floating_point():
            tolerance = TOLERANCE[x.dtype]
            assert torch.allclose(x, y, rtol=tolerance, atol=tolerance), name
        else:
            assert torch.equal(x, y), name


@pytest.fixture(scope="module")
def found():
    return runs.alone()


def test_the_same_things_are_recorded(found):
    assert found.keys() == recorded(False).keys()


@pytest.mark.parametrize("rule", runs.RULES)
def test_rule(found, rule):
    assert_as_recorded(rule, found, recorded(False))

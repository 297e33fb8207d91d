"""Every rule gives what it gave when the golden file was recorded, to the rounding of another processor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.golden import runs
from tests.properties import TOLERANCE

WANTED = load_file(Path(__file__).with_name("golden.safetensors"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return runs.everything(tmp_path_factory.mktemp("golden"))


def test_the_same_things_are_recorded(found):
    assert found.keys() == WANTED.keys()


@pytest.mark.parametrize("rule", sorted({name.split(" / ")[0] for name in WANTED}))
def test_rule(found, rule):
    names = [name for name in WANTED if name.startswith(f"{rule} / ")]
    for name in names:
        x, y = found[name], WANTED[name]
        assert x.dtype == y.dtype, name
        if x.is_floating_point():
            tolerance = TOLERANCE[x.dtype]
            assert torch.allclose(x, y, rtol=tolerance, atol=tolerance), name
        else:
            assert torch.equal(x, y), name

"""Two processes give what they gave when the golden file was recorded, to the rounding of another processor."""

import pytest

from tests.golden.runs import IN_TWO
from tests.golden.test_golden import assert_as_recorded, recorded


def test_the_same_things_are_recorded(found):
    first, _ = found("golden")
    assert first.keys() == recorded(True).keys()


@pytest.mark.parametrize("rule", IN_TWO)
def test_rule(found, rule):
    first, _ = found("golden")
    assert_as_recorded(rule, first, recorded(True))

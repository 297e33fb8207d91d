"""docs/optimizers.md says of each optimizer and adapter what the command that made it finds now."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests import accelerate_state

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "optimizers.md").read_text(encoding="utf-8").replace("\\[", "[")
SPEC = importlib.util.spec_from_file_location("tried_optimizers", DOCS / "optimizers.py")
TRIED = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TRIED)


@pytest.fixture(autouse=True)
def fresh_state():
    with accelerate_state.fresh():
        yield


def row(name):
    return [cell.strip() for cell in re.search(rf"^\| {re.escape(name)} \|(.*)\|$", TEXT, re.MULTILINE)[1].split("|")]


@pytest.mark.parametrize("name", [*TRIED.OPTIMIZERS, *TRIED.ADAPTERS])
def test_a_row_is_what_is_found(name):
    checks = TRIED.CHECKS if name in TRIED.OPTIMIZERS else TRIED.ADAPTER_CHECKS
    library, *cells = row(name)
    assert library == TRIED.library_of(name)
    for check, cell in zip(checks, cells, strict=True):
        found = TRIED.outcome(name, check)
        if found == TRIED.ABSENT:
            pytest.skip(f"{library} is not installed")
        assert cell == found.partition(":")[0], (check, found)
        assert ":" not in found or f"- {name}, {check}: {found}\n" in TEXT


def test_the_columns_are_the_checks():
    for checks in (TRIED.CHECKS, TRIED.ADAPTER_CHECKS):
        assert f"| of | {' | '.join(checks)} |" in TEXT

"""A drift budget and protected inputs in two processes, DDP and FSDP2: as one process with the whole batch.

Also if two go on with what one saved, and one with what two did.
"""

import pytest
from torch import Tensor

from tests.distributed import rules
from tests.properties import assert_same_bits


def close(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= 1e-7 * (1 + y.abs().max()))


def assert_agree(actual, wanted, form):
    assert all(map(close, actual["weights"], wanted["weights"]))
    if form == "budget":
        assert all(map(close, actual["held"], wanted["held"]))
        assert actual["diagnostics"]["align"] == pytest.approx(wanted["diagnostics"]["align"], rel=1e-4)
    else:
        n = len(wanted["held"]) // 2
        assert all(map(close, actual["held"][:n], wanted["held"][:n]))
        # An eigenvector's sign is its own: what it spans is compared.
        spans = [[q @ q.T for q in run["held"][n:]] for run in (actual, wanted)]
        assert all(map(close, *spans))
        assert any(0 < q.shape[1] < len(q) for q in wanted["held"][n:])


@pytest.mark.parametrize(("kind", "form"), rules.CASES)
@pytest.mark.parametrize("which", ["whole", "resumed"])
def test_two_processes_agree_with_one_and_with_each_other(found, alone, which, kind, form):
    first, second = found(f"{which}, {kind}, {form}")
    assert_same_bits(first["weights"], second["weights"])
    assert_same_bits(first["held"], second["held"])
    assert first["diagnostics"] == second["diagnostics"]
    assert_agree(first, alone[kind, form], form)


@pytest.mark.parametrize(("kind", "form"), rules.CASES)
def test_one_process_goes_on_with_what_two_saved(found, folder, alone, kind, form):
    found(f"whole, {kind}, {form}")
    resumed = rules.resumed("alone", form, rules.PICTURES[kind], folder / f"two {kind} {form}")
    assert_agree(resumed, alone[kind, form], form)

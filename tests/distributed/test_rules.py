"""Rules in two processes, DDP and FSDP2: as one process with the whole batch.

Many go on with what one process saved after half of the steps, and one process with what two did.
"""

import pytest
from torch import Tensor

from tests.distributed import losses, rules
from tests.properties import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:Anchor holds linear layers")
# L_v is taken in float32, and a drift budget turns its rounding into α. All else is float64.
TOLERANCE = dict.fromkeys(rules.FORMS, 1e-6) | dict.fromkeys(rules.EXACT, 1e-9)


def close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= tolerance * (1 + y.abs().max()))


def assert_agree(actual, wanted, form):
    for name in ("weights", "sums", "spans"):
        one, other = ((run | run["held"])[name] for run in (actual, wanted))
        assert len(one) == len(other)
        for i, (x, y) in enumerate(zip(one, other, strict=True)):
            assert close(x, y, TOLERANCE[form]), f"{name} {i}: {x - y}"
    assert actual["diagnostics"].keys() == wanted["diagnostics"].keys()
    for name, value in wanted["diagnostics"].items():
        assert actual["diagnostics"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize(("kind", "form"), rules.CASES)
def test_two_processes_agree_with_one_and_with_each_other(found, alone, kind, form):
    first, second = found(f"rule, {kind}, {form}")
    assert_same_bits(first["weights"], second["weights"])
    for name in ("sums", "spans"):
        assert_same_bits(first["held"][name], second["held"][name])
    assert first["diagnostics"] == second["diagnostics"]
    assert_agree(first, alone[kind, form], form)


@pytest.mark.parametrize(("kind", "form"), rules.RESUMED)
def test_one_process_goes_on_with_what_two_saved(found, folder, alone, kind, form):
    found(f"rule, {kind}, {form}")
    resumed = rules.resumed(form, rules.PICTURES[kind], folder / f"two {kind} {form}")
    assert_agree(resumed, alone[kind, form], form)


def test_the_cases_are_not_trivial(alone):
    for (kind, form), run in alone.items():
        start = [p.detach() for p in rules.build("alone", form)[0].parameters() if p.requires_grad]
        assert max(float((x - p).abs().max()) for x, p in zip(run["weights"], start, strict=True)) > 1e-3, (kind, form)
        if "budget" in form:
            assert all(x > 0 for x in run["held"]["sums"][:3]), (kind, form)
        if form == "inputs":
            ranks = [int(q.trace().round()) for q in run["held"]["spans"]]
            assert any(0 < r < len(q) for r, q in zip(ranks, run["held"]["spans"], strict=True))


@pytest.mark.parametrize("kind", losses.KINDS)
def test_plain_losses(found, kind):
    first, second = found(f"plain loss, {kind}")
    assert_same_bits(first, second)
    # The anchor's loss is refused where parameters are sharded.
    wanted = losses.plain(kind.replace("ddp", "alone").replace("fsdp", "alone fsdp"))
    assert all(close(x, y, 1e-6) for x, y in zip(first, wanted, strict=True))


def test_an_anchor_of_low_rank_loses_some_of_what_the_parts_hold(found):
    first, second = found("low rank")
    assert_same_bits(first, second)
    # Each process keeps four directions of its part, of 16 to 25, before they are added up: C is not that of the whole.
    for x, y in zip(first, losses.low_rank(), strict=True):
        assert (x - y).norm() <= 0.2 * y.norm()


def test_an_anchor_that_each_process_calibrated_by_itself_is_refused(found):
    for message in found("calibrated apart"):
        assert message.startswith("RuntimeError: Anchor: each process was calibrated with batches of its own")
        assert "group=torch.distributed.group.WORLD" in message


def test_an_anchor_that_all_processes_calibrated_alike(found):
    assert_same_bits(*found("calibrated alike"))


def test_an_anchors_loss_on_shards_is_refused(found):
    for message in found("held in shards"):
        assert message.startswith(
            "ValueError: Anchor.hold: parameters are sharded by fully_shard, which is not supported"
        )

"""Two processes compute what one computes from the whole batch: the Trainer, accelerate, peft and Lightning."""

import math

import pytest

from tests.distributed import fsdp2, integrations
from tests.properties import assert_same_bits


def assert_agree(actual, wanted):
    """To the rounding of L_v, which is taken in float32."""
    for x, y in zip(actual["weights"], wanted["weights"], strict=True):
        assert (x - y).abs().max() <= 1e-6 * (1 + y.abs().max())
    assert_close(actual["diagnostics"], wanted["diagnostics"])


def assert_close(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert math.isclose(actual[name], value, rel_tol=1e-5, abs_tol=1e-6), name


@pytest.mark.parametrize("settings", integrations.SETTINGS)
def test_trainer(found, folder, settings):
    wanted = integrations.trainer(1, folder / "alone", settings)
    first, second = found(f"trainer, {settings}")
    for actual in (first, second):
        assert_agree(actual, wanted)
        for one, other in zip(actual["logs"], wanted["logs"], strict=True):
            assert_close(one, other)
    assert first["logs"] == second["logs"]
    assert_same_bits(first["weights"], second["weights"])
    # What is clipped is d, and it is long enough to be.
    assert min(entry["grad_norm"] for entry in wanted["logs"] if "grad_norm" in entry) > integrations.CLIP


@pytest.mark.parametrize("settings", ["published", "compact"])
def test_a_resumed_trainer_is_the_uninterrupted_one_bit_for_bit(found, settings):
    for whole, resumed in found(f"resumed, {settings}"):
        assert_same_bits(resumed["weights"], whole["weights"])
        assert resumed["diagnostics"] == whole["diagnostics"]
        # The last is about the whole run, of which the resumed one sees a part.
        assert resumed["logs"][:-1] == whole["logs"][:-1]


@pytest.mark.parametrize(("settings", "lora"), integrations.ACCELERATED)
def test_accelerate(found, settings, lora):
    wanted = integrations.accelerated(0, 1, settings, lora)
    for actual in found(f"accelerate, {settings}, {lora}"):
        assert_agree(actual, wanted)


@pytest.mark.parametrize(("settings", "kind"), integrations.WITH_LIGHTNING)
def test_lightning(found, folder, settings, kind):
    wanted = integrations.lightning(0, 1, folder, settings, kind)
    for actual in found(f"{kind.__name__}, {settings}"):
        assert_agree(actual, wanted)


def test_manual_optimization_that_nobody_averages_is_refused(found):
    for message in found("untold"):
        assert message.startswith(
            "ValueError: mdgd_backward: LightningMDGDOptimizer is of a framework that runs 2 processes"
        )
        assert "call average_over(" in message


def test_another_strategy_of_lightning_is_refused(found):
    for message in found("another strategy"):
        assert message.startswith("ValueError: MDGDModuleMixin supports several processes with strategy='ddp' or Model")


def test_lightning_with_fsdp2_is_one_process_and_a_resumed_run_the_uninterrupted_one(found, folder):
    """``ModelParallelStrategy``, whose checkpoints are shards of torch.distributed.checkpoint."""
    wanted = fsdp2.lightning(0, 1, folder / "alone", "published", epochs=2)
    assert wanted["diagnostics"]["visual_loss"] > 0
    for whole, resumed in found("fsdp2 lightning"):
        assert_agree(whole, wanted)
        assert_agree(resumed, wanted)


@pytest.mark.parametrize(
    ("name", "words"),
    [("tensor parallel", "with tensor parallelism"), ("not sharded", "with a model that is not sharded")],
)
def test_lightnings_model_parallel_strategy_is_refused_where_nobody_would_average(name, words, found):
    for message in found(f"lightning, {name}"):
        assert message.startswith(f"ValueError: MDGDModuleMixin: ModelParallelStrategy {words}")


def assert_fsdp2_agrees(actual, wanted):
    assert wanted["logs"][1]["visual_loss"] > 0
    assert_agree(actual, wanted)
    for one, other in zip(actual["logs"], wanted["logs"], strict=True):
        assert_close(one, other)


def test_fsdp2_in_the_trainer(found, folder):
    wanted = fsdp2.trainer(1, folder / "alone", "published")
    for actual in found("fsdp2 trainer"):
        assert_fsdp2_agrees(actual, wanted)


def test_fsdp2_in_accelerate(found):
    wanted = fsdp2.accelerated(0, 1, "masked")
    for actual in found("fsdp2 accelerate"):
        assert_agree(actual, wanted)


@pytest.mark.parametrize("settings", ["masked", "anchor"])
def test_a_resumed_trainer_with_fsdp2_is_the_uninterrupted_one(found, folder, settings):
    """And that is the one of one process. Saved are whole tensors in one case, and shards in the other."""
    wanted = fsdp2.trainer(1, folder / "alone", settings, **fsdp2.LONGER)
    for whole, resumed in found(f"fsdp2 resumed, {settings}"):
        assert_fsdp2_agrees(whole, wanted)
        assert_agree(resumed, whole)
        for one, other in zip(resumed["logs"][:-1], whole["logs"][:-1], strict=True):
            assert_close(one, other)

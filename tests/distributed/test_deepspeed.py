"""Two processes in DeepSpeed's engine compute what one computes from the whole batch without it."""

import math
import re

import pytest

pytest.importorskip("deepspeed")

from tests.distributed import pair, zero, zero_workers


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return pair.outcomes(zero_workers.run, tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture
def found(outcomes):
    def of(name):
        out = [rank[name] for rank in outcomes]
        for one in out:
            assert not isinstance(one, str) or "Traceback" not in one, one
        return out

    return of


def assert_agree(actual, wanted):
    for x, y in zip(actual["weights"], wanted["weights"], strict=True):
        assert (x - y).abs().max() <= 1e-5 * (1 + y.abs().max())
    assert_close(actual["diagnostics"], wanted["diagnostics"])


def assert_close(actual, wanted):
    # The optimizer goes on showing the last L_v at steps that have none.
    assert actual.keys() <= wanted.keys()
    assert wanted.keys() - actual.keys() <= {"visual_loss"}
    for name, value in actual.items():
        assert math.isclose(wanted[name], value, rel_tol=1e-3, abs_tol=1e-5), name


@pytest.mark.parametrize(("stage", "form", "trained"), zero.CASES)
def test_two_processes_agree_with_one_without_deepspeed(found, stage, form, trained):
    wanted = zero.alone(form, trained)
    assert_moved(wanted, trained)
    for actual in found(f"{stage}, {form}, {trained}"):
        assert_agree(actual, wanted)


def assert_moved(outcome, trained="all"):
    """A hundred times as far as outcomes may differ."""
    start = [p for p in zero.network(trained).parameters() if p.requires_grad]
    assert max(float((x - y).abs().max()) for x, y in zip(outcome["weights"], start, strict=True)) > 1e-3


@pytest.mark.parametrize("stage", [3, 1])
def test_a_resumed_run_is_the_uninterrupted_one(found, stage):
    """φ and the anchor's moments come with it, also to an engine that began elsewhere, and to one of another stage."""
    for outcome in found(f"resumed, {stage}"):
        assert_agree(outcome["resumed"], outcome["whole"])


@pytest.mark.parametrize("stage", [1, 3])
def test_a_loss_of_ones_own_with_the_reference_in_partitions(found, stage):
    wanted = zero.loss_form(None, 0, 1)
    assert_moved(wanted)
    for actual in found(f"loss, {stage}"):
        assert_agree(actual, wanted)


def test_bfloat16_with_dropout_and_checkpointing(found):
    """θ is φ at first, so that there is no drift although numbers are dropped."""
    first, second = found("bfloat16")
    assert first == second
    assert first[0] == 0 < min(first[1:])


def test_accelerate(found):
    wanted = zero.alone("align", "all")
    for actual in found("accelerate"):
        assert_agree(actual, wanted)


def test_trainer(found, tmp_path):
    wanted = zero.trainer(1, None, "published", tmp_path)
    assert_moved(wanted)
    for actual in found("trainer"):
        assert_agree_and_tell(actual, wanted)


def assert_agree_and_tell(actual, wanted):
    assert_agree(actual, wanted)
    for one, other in zip(actual["logs"], wanted["logs"], strict=True):
        assert_close(one, other)


def test_a_resumed_trainer_is_the_uninterrupted_one_and_that_is_the_one_without_deepspeed(found, tmp_path):
    wanted = zero.trainer(1, None, "anchor and lazy", tmp_path, "lora")
    assert_moved(wanted, "lora")
    for whole, resumed in found("resumed trainer"):
        assert_agree_and_tell(whole, wanted)
        assert_agree(resumed, whole)
        for one, other in zip(resumed["logs"][:-1], whole["logs"][:-1], strict=True):
            assert one.keys() == other.keys()
            assert one.get("visual_loss", 0) == pytest.approx(other.get("visual_loss", 0), rel=1e-4)


REFUSALS = {
    "a correcting rule": "ValueError: MDGDEngine does not support StepProject.*FSDP2",
    "no rule": "TypeError: MDGDEngine: rule must be a Rule",
    "an optimizer": "TypeError: the parameters cannot be wrapped: DeepSpeed's engine .*MDGDEngine",
    "the model": "TypeError: DeepSpeedEngine is not supported: .*MDGDEngine",
    "hold": "ValueError: Anchor.hold: parameters are partitioned by DeepSpeed, .*MDGDEngine",
    "nothing saved": "FileNotFoundError: .*mdgd.safetensors is not there: MDGDEngine.save writes it",
    "pictures on one rank": "RuntimeError: MDGDEngine: some processes' batches have pictures and others' have none",
    "weights of a group": "ValueError: MDGDEngine: a parameter group has 'mdgd_align'",
    "stage 0": "ValueError: MDGDEngine: the engine has no ZeRO: use stage 1, 2 or 3",
    "a model": "TypeError: MDGDEngine takes the engine of deepspeed.initialize, not LlavaForConditionalGeneration",
    "a mask": "ValueError: MDGDTrainer does not support a mask with DeepSpeed",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(found, name):
    for outcome in found("refusals"):
        assert re.match(REFUSALS[name], outcome[name]), outcome[name]


@pytest.mark.parametrize("name", ["engine", "trainer"])
def test_example(found, name):
    for printed in found(f"example, {name}"):
        assert len(re.findall(r"loss \d+\.\d+", printed)) >= 3
    visual = [float(x) for x in re.findall(r"visual loss (\d+\.\d+)", found(f"example, {name}")[0])]
    assert visual[-1] > 0

"""Two processes compute what one computes from the whole batch: DDP and FSDP2, by hand and through mdgd_backward."""

import math
import re

import pytest
import torch

from tests.distributed import checkpoints, setups, workers
from tests.properties import assert_same_bits
from torch_mdgd import Given, Magnitude, MDGDOptimizer, Random, kernels
from torch_mdgd.delta import apply_delta

ALONE = [f"{kind}, {form}" for kind in ("ddp", "fsdp") for form in setups.FORMS]
LLAVA = [f"{kind}, {form}" for kind in ("ddp", "fsdp") for form in setups.LLAVA_FORMS]


def assert_agree(actual, wanted, tolerance):
    """Every step of two runs: numbers to rounding beside the largest of their tensor, masks exactly."""
    assert len(actual) == len(wanted)
    for step, (one, other) in enumerate(zip(actual, wanted, strict=True)):
        assert len(one["mask"]) == len(other["mask"])
        for i, (x, y) in enumerate(zip(one["mask"], other["mask"], strict=True)):
            assert torch.equal(x, y), f"step {step}, mask {i}: {x} and {y}"
        for name in ("d", "weights"):
            for i, (x, y) in enumerate(zip(one[name], other[name], strict=True)):
                assert (x is None) == (y is None), f"step {step}, {name} {i}"
                if x is not None:
                    assert (x - y).abs().max() <= tolerance * (1 + y.abs().max()), f"step {step}, {name} {i}: {x - y}"
        assert one["diagnostics"].keys() == other["diagnostics"].keys()
        for name, value in one["diagnostics"].items():
            assert math.isclose(value, other["diagnostics"][name], rel_tol=tolerance, abs_tol=tolerance), (step, name)


@pytest.mark.parametrize("name", ALONE)
def test_two_processes_agree_with_one(found, name):
    form = name.split(", ", 1)[1]
    wanted = setups.by_hand("alone", form)
    assert any(m.any() for m in wanted[-1]["mask"]) == ("mask" in setups.FORMS[form] and form not in setups.COMPACT)
    for actual in found(name):
        assert_agree(actual, wanted, 1e-11)


@pytest.mark.parametrize("name", LLAVA)
def test_mdgd_backward_in_two_processes_agrees_with_one(found, name):
    kind, form = name.split(", ", 1)
    pictures = setups.ALL_WITH if kind == "fsdp" else setups.SOME_WITHOUT
    wanted = setups.with_backward("alone", form, pictures)
    assert wanted[1]["diagnostics"]["visual_loss"] > 0
    for actual in found(f"{kind}, llava, {form}"):
        assert_agree(actual, wanted, 1e-6)


def test_averaging_captures_makes_two_backward_passes_after_one_forward_exact(found):
    wanted = setups.twice_after_one_forward(0, 1, False)
    for actual in found("twice after one forward"):
        for x, y in zip(actual, wanted, strict=True):
            assert torch.allclose(x, y, rtol=0, atol=1e-13)


def test_a_model_that_nobody_wrapped(found):
    """A warning once, and with the group told, what DistributedDataParallel would give."""
    wanted = setups.with_backward("alone", "masked, accumulated", setups.SOME_WITHOUT)
    for actual, messages in found("not wrapped"):
        assert len(messages) == 1
        assert "gradients stay this process's own" in messages[0]
        assert_agree(actual, wanted, 1e-6)


@pytest.mark.parametrize("layout", ["rows", "columns", "some whole", "copies of parts"])
def test_kernels_on_shards_agree_with_those_on_whole_tensors(found, layout):
    g, v, g0 = (workers.tensors(i) for i in range(3))
    for outcome in found("kernels on shards"):
        actual = outcome[layout]
        assert torch.equal(actual["products"], kernels.inner_products([g, v], [v, g0]))
        for k, masks in actual["masks"].items():
            wanted = kernels.top_k_similarity_masks(g, v, g0, torch.full((3,), 0.5), k)
            assert all(map(torch.equal, masks, wanted)), k
        assert all(map(torch.equal, actual["top"], kernels.top_k_masks([x.abs() for x in g], 11)))
        assert actual["kept"] == 11
        assert all(torch.equal(x, y + 2 * z) for x, y, z in zip(actual["combined"], g, v, strict=True))


def test_a_nan_on_one_rank_is_an_error_on_all(found):
    for outcome in found("kernels on shards"):
        assert "has a NaN" in outcome["nan"]


def test_masks_chosen_when_sharded_parameters_are_wrapped(found):
    parameters = list(setups.network().parameters())
    wanted = {
        "Magnitude": Magnitude(0.3),
        "Random": Random(0.3),
        "Given": Given([p > 0 for p in parameters]),
    }
    for outcome in found("masks on shards"):
        for name, mask in wanted.items():
            assert all(map(torch.equal, outcome[name], mask.choose(parameters, None))), name


@pytest.mark.parametrize("form", workers.SHARDED_LATER)
def test_parameters_that_are_sharded_after_they_were_wrapped(found, form):
    wanted = setups.by_hand("alone", form)
    for outcome in found(f"sharded after it was wrapped, {form}"):
        for actual in outcome.values():
            assert_agree(actual, wanted, 1e-11)


REFUSALS = {
    "gradients in buckets": "RuntimeError: capture of reference_task: this backward pass wrote over gradients",
    "compact, sharded later": "ValueError: compact=True: parameters were sharded after the mask was chosen",
    "reference without model": "ValueError: reference: parameters are sharded, so pass the model",
    "whole gradients": "ValueError: task gradient of parameter 0 is not sharded as the parameter is",
    "static graph": "ValueError: static_graph=True",
    "pictures on one rank": "RuntimeError: mdgd_backward: some ranks have image tokens and others have none",
    "fsdp1 parameters": "TypeError: the parameters cannot be wrapped: FullyShardedDataParallel",
    "fsdp1 model": "TypeError: FullyShardedDataParallel is not supported",
    "zero": "TypeError: ZeroRedundancyOptimizer cannot be wrapped",
    "inside zero": "TypeError: base must be a torch.optim.Optimizer",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(found, name):
    for outcome in found("refusals"):
        assert outcome[name].startswith(REFUSALS[name])


@pytest.mark.parametrize("form", workers.CHECKPOINTED)
def test_one_process_resumes_what_two_saved(found, folder, form):
    found(f"save, {form}")
    net, optimizer = workers.build(form, "alone")
    checkpoints.restore(net, optimizer, folder / f"two {form}")
    resumed = list(setups.train(net, optimizer, 0, 1, range(2, setups.STEPS)))
    assert_agree(resumed, setups.by_hand("alone", form)[2:], 1e-11)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("form", workers.CHECKPOINTED)
def test_two_processes_resume_what_one_saved(found, kind, form):
    for outcome in found(f"resume, {form}"):
        assert_agree(outcome[kind], setups.by_hand("alone", form)[2:], 1e-11)


@pytest.mark.parametrize("form", [form for form in workers.CHECKPOINTED if "compact" in form])
def test_a_compact_state_dict_of_two_processes_is_that_of_one(found, folder, form):
    found(f"save, {form}")
    actual = torch.load(folder / f"two {form}.pt", weights_only=True)["state"]
    net, optimizer = workers.build(form, "alone")
    list(setups.train(net, optimizer, 0, 1, range(2)))
    wanted = optimizer.state_dict()["state"]
    assert len(actual) == len(wanted)
    for (name, _), entry in zip(net.named_parameters(), wanted.values(), strict=True):
        assert actual[name].keys() == entry.keys()
        for key, value in entry.items():
            assert actual[name][key].dtype == value.dtype
            assert torch.allclose(actual[name][key], value, rtol=1e-10, atol=1e-12), (name, key)


@pytest.mark.parametrize("form", workers.DELTAS)
def test_a_delta_of_two_processes_in_one(found, folder, form):
    total = sum(p.numel() for p in setups.network().parameters())
    for changed, weights, refused in found(f"delta, {form}"):
        net = setups.network()
        apply_delta(net, folder / f"{form}.safetensors")
        assert_same_bits(list(net.parameters()), weights)
        assert changed == (round(0.3 * total) if "masked" in form else total)
        assert refused.startswith("ValueError: apply_delta: parameters are sharded")


def test_a_compact_checkpoint_is_not_skipped_in_silence(found):
    for outcome in found("compact loads nothing"):
        assert "mdgd_positions" in outcome


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_example(found, name):
    for rank, printed in enumerate(found(f"example, {name}")):
        losses = re.findall(rf"rank {rank}: loss (\d+\.\d+)", printed)
        assert len(losses) == 4
        assert ("visual loss" in printed) == (rank == 0)


@pytest.mark.parametrize("where", ["engine", "optimizer"])
def test_deepspeed_is_refused(where):
    net = setups.network()
    if where == "optimizer":
        net.head.weight.ds_id = 0
        with pytest.raises(TypeError, match="cannot be wrapped: DeepSpeed's engine keeps gradients"):
            MDGDOptimizer(setups.adamw(net))
        return
    engine = type("DeepSpeedEngine", (torch.nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    with pytest.raises(TypeError, match="DeepSpeedEngine is not supported: DeepSpeed's engine"):
        workers.mdgd_backward(engine, MDGDOptimizer(setups.adamw(net)), {})

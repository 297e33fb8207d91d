"""Two processes that go through all cases, one after the other, and write what each found to a file."""

import copy
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import checkpoints, fsdp2, integrations, losses, paper_rows, rules, setups
from tests.distributed.pair import WORLD
from tests.distributed.setups import error, example
from tests.golden import runs
from torch_mdgd import Given, Magnitude, MDGDOptimizer, Project, Random, kernels, mdgd_backward
from torch_mdgd.delta import apply_delta, save_delta
from torch_mdgd.parallel import dtensor
from torch_mdgd.rules.base import KINDS

CHECKPOINTED = ("published", "masked", *setups.COMPACT)
SHARDED_LATER = ("published", "masked when wrapped")
DELTAS = ("masked step, compact", "published")


def run(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}

    def case(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            found[name] = function(*args, **kwargs)
        except Exception:
            found[name] = traceback.format_exc()

    for kind in ("ddp", "fsdp"):
        for form in setups.FORMS:
            case(f"{kind}, {form}", setups.by_hand, kind, form, rank, WORLD)
        for form in setups.LLAVA_FORMS:
            pictures = setups.ALL_WITH if kind == "fsdp" else setups.SOME_WITHOUT
            case(f"{kind}, llava, {form}", setups.with_backward, kind, form, pictures, rank, WORLD)
    case("golden", runs.in_two, rank)
    case("not wrapped", not_wrapped, rank)
    case("twice after one forward", setups.twice_after_one_forward, rank, WORLD, True)
    case("kernels on shards", kernels_on_shards)
    case("masks on shards", masks_on_shards)
    for form in SHARDED_LATER:
        case(f"sharded after it was wrapped, {form}", sharded_after_it_was_wrapped, form, rank)
    case("refusals", refusals, rank)
    for form in CHECKPOINTED:
        case(f"save, {form}", save, form, folder, rank)
        case(f"resume, {form}", resume, form, folder, rank)
    case("compact loads nothing", compact_loads_nothing, folder)
    for form in DELTAS:
        case(f"delta, {form}", delta, form, folder, rank)
    for name in ("ddp", "fsdp"):
        case(f"example, {name}", example, name, folder)
    rules.run(case, folder, rank, WORLD)
    losses.run(case, error, rank, WORLD)
    with_libraries(case, folder, rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def with_libraries(case: Callable[..., None], folder: Path, rank: int) -> None:
    integrations.environment(rank, WORLD)
    for settings in integrations.SETTINGS:
        case(f"trainer, {settings}", integrations.trainer, WORLD, folder / "trainer", settings)
    for settings, lora in integrations.ACCELERATED:
        case(f"accelerate, {settings}, {lora}", integrations.accelerated, rank, WORLD, settings, lora)
    for settings, kind in integrations.WITH_LIGHTNING:
        case(f"{kind.__name__}, {settings}", integrations.lightning, rank, WORLD, folder, settings, kind)
    for settings in ("published", "compact"):
        case(f"resumed, {settings}", integrations.resumed_trainer, folder / f"resumed {settings}", settings)
    case("untold", error, integrations.lightning, rank, WORLD, folder, "published", integrations.Untold)
    case("another strategy", error, integrations.another_strategy, folder)
    fsdp2.run(case, folder, rank)
    paper_rows.run(case, folder, rank, WORLD)


def not_wrapped(rank: int) -> tuple[list[dict[str, Any]], list[str]]:
    """LLaVA as it is, in two processes: alone, then with the group told."""
    net = setups.tiny_llava()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for step in range(2):
            mdgd_backward(net, MDGDOptimizer(setups.adamw(net)), setups.llava_part(step, rank, WORLD, (True,) * 4))
            net.zero_grad()
    found = setups.with_backward("told", "masked, accumulated", setups.SOME_WITHOUT, rank, WORLD)
    return found, [str(w.message) for w in seen if "mdgd_backward" in str(w.message)]


# Single operations, on tensors sharded in every way.


def layouts() -> dict[str, list[tuple[Any, list[Any]]]]:
    """For three tensors of sizes (5, 3), (4, 6) and (1,), meshes and placements."""
    line, plane = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts"))
    return {
        "rows": [(line, [Shard(0)])] * 3,
        "columns": [(line, [Shard(1)]), (line, [Shard(1)]), (line, [Shard(0)])],
        "some whole": [(line, [Shard(0)]), (line, [Replicate()]), (line, [Replicate()])],
        "copies of parts": [(plane, [Replicate(), Shard(0)])] * 3,
    }


def tensors(seed: int) -> list[torch.Tensor]:
    """Of few different values, so that most of them tie."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-2, 3, s, generator=generator).double() for s in ((5, 3), (4, 6), (1,))]


def kernels_on_shards() -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, places in layouts().items():
        g, v, g0 = ([distribute_tensor(x, *at) for x, at in zip(tensors(i), places, strict=True)] for i in range(3))
        products = kernels.inner_products([g, v], [v, g0])
        masks = {k: kernels.top_k_similarity_masks(g, v, g0, torch.full((3,), 0.5), k) for k in (1, 7, 20, 33, 40)}
        top = kernels.top_k_masks([x.abs() for x in g], 11)
        kept = dtensor.count(top)
        kernels.combine_(g, [g, v], torch.tensor([[1.0, 2.0]] * 3))
        out[name] = {
            "products": products,
            "masks": {k: [setups.whole(m) for m in mask] for k, mask in masks.items()},
            "top": [setups.whole(m) for m in top],
            "kept": kept,
            "combined": [setups.whole(x) for x in g],
        }
    bad = distribute_tensor(torch.tensor([1.0, 2.0, 3.0, float("nan")]), *layouts()["rows"][0])
    out["nan"] = error(kernels.top_k_masks, [bad], 1)
    return out


def masks_on_shards() -> dict[str, list[Any]]:
    """Masks that are chosen when the optimizer is wrapped."""
    given = Given([p > 0 for p in setups.network().parameters()])
    out = {}
    for mask in (Magnitude(0.3), Random(0.3), given):
        net = setups.network()
        setups.parallel(net, "fsdp")
        optimizer = MDGDOptimizer(setups.adamw(net), Project(), mask=mask)
        out[type(mask).__name__] = [setups.whole(x) for x in optimizer._storage.masks]
    return out


def sharded_after_it_was_wrapped(form: str, rank: int) -> dict[str, list[dict[str, Any]]]:
    """As accelerate does: the parameters in the groups are replaced."""
    found = {}
    for first in ("a step", "gradients given", "state dict"):
        net = setups.network()
        optimizer = setups.wrapped(setups.adamw(net), setups.FORMS[form])
        setups.parallel(net, "fsdp")
        optimizer.param_groups[0]["params"] = list(net.parameters())
        if first == "gradients given":
            optimizer.set_gradients(**{kind: [torch.zeros_like(p) for p in net.parameters()] for kind in KINDS})
            optimizer.combine()
            optimizer.zero_grad()
        if first == "state dict":
            own = [x for entry in optimizer.state_dict()["state"].values() for x in entry.values()]
            assert all(map(dtensor.is_sharded, own))
        found[first] = list(setups.train(net, optimizer, rank, WORLD))
    return found


# What is refused.


def refusals(rank: int) -> dict[str, str]:
    net = setups.network()
    setups.parallel(net, "fsdp")
    optimizer = MDGDOptimizer(setups.adamw(net))

    def reference() -> None:
        with optimizer.reference():
            pass

    later = setups.network()
    compact = MDGDOptimizer(setups.adamw(later), Project(), mask=Random(0.3), compact=True)
    setups.parallel(later, "fsdp")
    compact.param_groups[0]["params"] = list(later.parameters())
    ones = [torch.ones_like(p) for p in later.parameters()]
    compact.set_gradients(task=ones, visual=ones)
    llava = setups.tiny_llava()
    fixed = DistributedDataParallel(setups.tiny_llava(), static_graph=True)
    sharded_llava = setups.tiny_llava()
    fully_shard(sharded_llava)
    wrapped = MDGDOptimizer(setups.adamw(sharded_llava))
    batch = setups.llava_part(0, rank, WORLD, (True, True, False, False))
    whole = [torch.ones(p.shape, dtype=p.dtype) for p in net.parameters()]
    plain = MDGDOptimizer(setups.adamw(llava))
    flat = FullyShardedDataParallel(setups.network(), device_id=torch.device("cpu"), use_orig_params=True)
    views = DistributedDataParallel(setups.network(), find_unused_parameters=True, gradient_as_bucket_view=True)
    held = MDGDOptimizer(setups.adamw(views))
    return {
        "gradients in buckets": error(lambda: list(setups.train(views, held, rank, WORLD))),
        "compact, sharded later": error(compact.step),
        "reference without model": error(reference),
        "whole gradients": error(optimizer.set_gradients, task=whole),
        "static graph": error(mdgd_backward, fixed, plain, batch),
        "pictures on one rank": error(mdgd_backward, sharded_llava, wrapped, batch),
        "fsdp1 parameters": error(MDGDOptimizer, torch.optim.SGD(flat.parameters(), lr=0.1)),
        "fsdp1 model": error(mdgd_backward, flat, plain, batch),
        "zero": error(MDGDOptimizer, ZeroRedundancyOptimizer(llava.parameters(), torch.optim.AdamW, lr=0.1)),
        "inside zero": error(ZeroRedundancyOptimizer, llava.parameters(), MDGDOptimizer),
    }


# Checkpoints.


def build(form: str, kind: str) -> tuple[nn.Module, MDGDOptimizer]:
    net = setups.network()
    model = setups.parallel(net, kind)
    return model, setups.wrapped(setups.adamw(net), setups.FORMS[form])


def save(form: str, folder: Path, rank: int) -> None:
    """Two steps under FSDP2, saved."""
    net, optimizer = build(form, "fsdp")
    list(setups.train(net, optimizer, rank, WORLD, range(2)))
    dcp.save(checkpoints.state(net, optimizer), checkpoint_id=folder / f"two {form}")
    # What a compact run saves is of all ranks as it is.
    options = StateDictOptions(full_state_dict="compact" not in form)
    full = get_optimizer_state_dict(net, optimizer, options=options)
    twin, other = build(form, "fsdp")
    set_optimizer_state_dict(twin, other, full, options=options)
    for x, y in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(setups.whole(x[k]), setups.whole(y[k])) for k in x)
    if rank == 0 and "compact" in form:
        torch.save(full, folder / f"two {form}.pt")


def resume(form: str, folder: Path, rank: int) -> dict[str, Any]:
    """What one process saved after two steps, two go on with, in both kinds."""
    out = {}
    for kind in ("ddp", "fsdp"):
        model, optimizer = build(form, kind)
        checkpoints.restore(model, optimizer, folder / f"one {form}")
        out[kind] = list(setups.train(model, optimizer, rank, WORLD, range(2, setups.STEPS)))
    return out


def delta(form: str, folder: Path, rank: int) -> tuple[int, list[Any], str]:
    """What was written, the weights that it has to give, and why it cannot be put on shards."""
    net, optimizer = build(form, "fsdp")
    list(setups.train(net, optimizer, rank, WORLD, range(2)))
    changed = save_delta(net, folder / f"{form}.safetensors", optimizer)
    assert (folder / f"{form}.safetensors").exists()
    weights = [setups.whole(p) for p in net.parameters()]
    return changed, weights, error(apply_delta, net, folder / f"{form}.safetensors")


def compact_loads_nothing(folder: Path) -> str:
    """A compact state has another size than that of a fresh optimizer, which is where it would be loaded to."""
    form = setups.FORMS["masked once, compact"]
    net = setups.network()
    optimizer = setups.wrapped(torch.optim.SGD(net.parameters(), lr=0.1), form)
    list(setups.train(net, optimizer, 0, 1, range(1)))
    dcp.save(checkpoints.state(net, optimizer), checkpoint_id=folder / "compact")
    fresh = copy.deepcopy(net)
    other = setups.wrapped(torch.optim.SGD(fresh.parameters(), lr=0.1), form)
    try:
        dcp.load(checkpoints.state(fresh, other), checkpoint_id=folder / "compact")
    except dcp.api.CheckpointException as raised:
        return str(raised).strip().splitlines()[-1]
    return "loaded"

"""A drift budget and protected inputs in two processes, DDP and FSDP2: as one process with the whole batch.

Also if two go on with what one saved, and one with what two did.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import setups, workers
from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer, VisualInputs, mdgd_backward

WORLD = 2
FORMS = ("budget", "inputs")
PICTURES = {"ddp": setups.SOME_WITHOUT, "fsdp": setups.ALL_WITH}
CASES = [(kind, form) for kind in PICTURES for form in FORMS]


def build(kind: str, form: str) -> tuple[nn.Module, MDGDOptimizer]:
    net = setups.tiny_llava()
    model = net
    if kind == "ddp":
        model = DistributedDataParallel(net)
    elif kind == "fsdp":
        for module in (*net.model.language_model.layers, net.model.multi_modal_projector):
            fully_shard(module)
        fully_shard(net)
    base = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    if form == "budget":
        return model, MDGDOptimizer(base, drift_budget=0.02)
    return model, MDGDOptimizer(base, update="project", space="step", protect=VisualInputs(net, 0.7, refresh=2))


def train(
    model: nn.Module, optimizer: MDGDOptimizer, pictures: Any, rank: int, world: int, steps: Sequence[int]
) -> dict[str, Any]:
    """Two micro-batches a step; returns whole weights, what a state dict holds of this rank's view, and diagnostics."""
    for step in steps:
        for i in range(2):
            batch = setups.llava_part(10 * step + i, rank, world, pictures[step])
            mdgd_backward(model, optimizer, batch, alignment="mse", weight=0.5, combine=i == 1)
        optimizer.step()
        optimizer.zero_grad()
    if optimizer.inputs is None:
        held = [optimizer.param_groups[0]["drift_pull"]]
    else:
        held = [*optimizer.inputs.covariances.values(), *optimizer.inputs.bases.values()]
    weights = [setups.whole(p) for p in model.parameters()]
    return {"weights": weights, "held": held, "diagnostics": optimizer.diagnostics}


def half_way_and_on(kind: str, form: str, pictures: Any, folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Four steps, saved after two."""
    parts = build(kind, form)
    train(*parts, pictures, rank, world, range(2))
    dcp.save(workers.state(*parts), checkpoint_id=folder)
    return train(*parts, pictures, rank, world, range(2, 4))


def resumed(kind: str, form: str, pictures: Any, folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    parts = build(kind, form)
    workers.restore(*parts, folder)
    return train(*parts, pictures, rank, world, range(2, 4))


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    found = {}
    for kind, form in CASES:
        more = PICTURES[kind], rank, WORLD
        found["whole", kind, form] = half_way_and_on(kind, form, more[0], folder / f"two {kind} {form}", *more[1:])
        found["resumed", kind, form] = resumed(kind, form, more[0], folder / f"one {kind} {form}", *more[1:])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What one process found and what each of two did, in a whole run and in one that goes on from the others'."""
    folder = tmp_path_factory.mktemp("rules")
    alone = {}
    for kind, form in CASES:
        place = folder / f"one {kind} {form}"
        alone["whole", kind, form] = half_way_and_on("alone", form, PICTURES[kind], place)
    torch.multiprocessing.spawn(run, (folder,), nprocs=WORLD)
    for kind, form in CASES:
        alone["resumed", kind, form] = resumed("alone", form, PICTURES[kind], folder / f"two {kind} {form}")
    return alone, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def close(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= 1e-7 * (1 + y.abs().max()))


@pytest.mark.parametrize(("kind", "form"), CASES)
@pytest.mark.parametrize("which", ["whole", "resumed"])
def test_two_processes_agree_with_one_and_with_each_other(outcomes, which, kind, form):
    alone, ranks = outcomes
    wanted = alone["whole", kind, form]
    first, second = (rank[which, kind, form] for rank in ranks)
    assert_same_bits(first["weights"], second["weights"])
    assert_same_bits(first["held"], second["held"])
    assert first["diagnostics"] == second["diagnostics"]
    for found in (first, alone[which, kind, form]):
        assert all(map(close, found["weights"], wanted["weights"]))
        if form == "budget":
            assert all(map(close, found["held"], wanted["held"]))
            assert found["diagnostics"]["align"] == pytest.approx(wanted["diagnostics"]["align"], rel=1e-4)
        else:
            n = len(wanted["held"]) // 2
            assert all(map(close, found["held"][:n], wanted["held"][:n]))
            # An eigenvector's sign is its own: what it spans is compared.
            spans = [[q @ q.T for q in run["held"][n:]] for run in (found, wanted)]
            assert all(map(close, *spans))
            assert any(0 < q.shape[1] < len(q) for q in wanted["held"][n:])

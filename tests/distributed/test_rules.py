"""A drift budget and protected inputs in two processes, DDP and FSDP2: as one process with the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import setups
from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer, VisualInputs, mdgd_backward

WORLD = 2
FORMS = ("budget", "inputs")
PICTURES = {"ddp": setups.SOME_WITHOUT, "fsdp": setups.ALL_WITH}


def train(kind: str, form: str, pictures: Any, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Two micro-batches a step; returns whole weights, what a state dict holds of this rank's view, and diagnostics."""
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
        optimizer = MDGDOptimizer(base, drift_budget=0.02)
    else:
        inputs = VisualInputs(net, 0.7, refresh=2)
        optimizer = MDGDOptimizer(base, update="project", space="step", protect=inputs)
    for step, rows in enumerate(pictures):
        for i in range(2):
            batch = setups.llava_part(10 * step + i, rank, world, rows)
            mdgd_backward(model, optimizer, batch, alignment="mse", weight=0.5, combine=i == 1)
        optimizer.step()
        optimizer.zero_grad()
    held = [optimizer.param_groups[0]["drift_pull"]] if form == "budget" else []
    if optimizer.inputs is not None:
        held = [*optimizer.inputs.covariances.values(), *optimizer.inputs.bases.values()]
    weights = [setups.whole(p) for p in net.parameters()]
    return {"weights": weights, "held": held, "diagnostics": optimizer.diagnostics}


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    found = {(k, form): train(k, form, PICTURES[k], rank, WORLD) for k in PICTURES for form in FORMS}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    torch.multiprocessing.spawn(run, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def close(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= 1e-7 * (1 + y.abs().max()))


@pytest.mark.parametrize("kind", list(PICTURES))
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_agree_with_one_and_with_each_other(ranks, kind, form):
    first, second = (rank[kind, form] for rank in ranks)
    alone = train("alone", form, PICTURES[kind])
    assert_same_bits(first["weights"], second["weights"])
    assert_same_bits(first["held"], second["held"])
    assert first["diagnostics"] == second["diagnostics"]
    assert all(map(close, first["weights"], alone["weights"]))
    if form == "budget":
        assert all(map(close, first["held"], alone["held"]))
        assert first["diagnostics"]["align"] == pytest.approx(alone["diagnostics"]["align"], rel=1e-4)
    else:
        n = len(alone["held"]) // 2
        assert all(map(close, first["held"][:n], alone["held"][:n]))
        # An eigenvector's sign is its own: what it spans is compared.
        spans = [[q @ q.T for q in found["held"][n:]] for found in (first, alone)]
        assert all(map(close, *spans))
        assert any(0 < q.shape[1] < len(q) for q in alone["held"][n:])

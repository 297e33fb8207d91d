"""Plain losses, and the anchor's own ways, in every process of a test."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import setups
from tests.distributed.rules import lora, prompts
from torch_mdgd import Anchor, MDGDOptimizer, mdgd_backward
from torch_mdgd.loss import Reference, visual_loss

KINDS = ("ddp", "ddp, lora", "fsdp", "fsdp, lora")
# L_v is the mean of the processes' means: of as many image tokens each, it is that of all.
EVEN = (True, False, True, False)


def model_of(kind: str) -> tuple[nn.Module, nn.Module]:
    """The model, and what is called."""
    net: Any = lora() if kind.endswith("lora") else setups.tiny_llava()
    if kind.startswith("ddp"):
        return net, DistributedDataParallel(net)
    if kind.startswith("fsdp"):
        inner = net.get_base_model() if kind.endswith("lora") else net
        for module in inner.model.language_model.layers:
            fully_shard(module)
        fully_shard(net)
    return net, net


def plain(kind: str, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Some steps of a plain optimizer on L + L_v, and the anchor's loss where parameters are whole."""
    net, model = model_of(kind)
    trained = [p for p in net.parameters() if p.requires_grad]
    reference, base = Reference(model), torch.optim.SGD(trained, lr=0.1)
    group = dist.group.WORLD if world > 1 else None
    anchor = None
    if "fsdp" not in kind:
        anchor = Anchor(net, 0.1, rank=None).hold().calibrate(prompts(rank, world), group=group)
    for step in range(3):
        batch = setups.llava_part(step, rank, world, EVEN)
        output, visual = visual_loss(model, batch, reference=reference, alignment="mse")
        loss = output.loss + visual
        (loss if anchor is None else loss + anchor.loss()).backward()
        base.step()
        base.zero_grad()
    return [setups.whole(p) for p in trained]


def low_rank(rank: int = 0, world: int = 1) -> list[Tensor]:
    """C of a rank so low that the sums of parts lose something."""
    net = setups.tiny_llava()
    group = dist.group.WORLD if world > 1 else None
    anchor = Anchor(net, rank=2).calibrate(prompts(rank, world, 3), group=group)
    MDGDOptimizer(torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1), anchor)
    found = [anchor.covariances.of(layer) for layer in anchor.layers]
    return [c.after([torch.eye(c.matrix.shape[1], dtype=c.matrix.dtype)])[0] for c in found]


def apart(rank: int, world: int) -> None:
    """Each process calibrates with batches of its own, and nobody says so."""
    net = setups.tiny_llava()
    optimizer = MDGDOptimizer(setups.adamw(net), Anchor(net).calibrate(prompts(rank, world)))
    mdgd_backward(DistributedDataParallel(net), optimizer, setups.llava_part(0, rank, world, EVEN))


def alike(rank: int, world: int) -> list[Tensor]:
    """All processes calibrate with the same batches."""
    net = setups.tiny_llava()
    optimizer = MDGDOptimizer(setups.adamw(net), Anchor(net).calibrate(prompts(0, 1)))
    mdgd_backward(DistributedDataParallel(net), optimizer, setups.llava_part(0, rank, world, EVEN))
    return [p.grad for p in optimizer.parameters]


def held_in_shards() -> None:
    Anchor(model_of("fsdp")[0]).hold()


def run(case: Callable[..., None], error: Callable[..., str], rank: int, world: int) -> None:
    for kind in KINDS:
        case(f"plain loss, {kind}", plain, kind, rank, world)
    case("low rank", low_rank, rank, world)
    case("calibrated apart", error, apart, rank, world)
    case("calibrated alike", alike, rank, world)
    case("held in shards", error, held_in_shards)

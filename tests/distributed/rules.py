"""Rules that look at features or inputs, or not at every step, in every process of a test; and rules of a user's own.

With one process the part is the whole batch, as in :mod:`tests.distributed.setups`.
"""

import functools
import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import checkpoints, setups
from tests.rules.anchored import adapted, move
from torch_mdgd import MDGD, Anchor, DriftBudget, MDGDOptimizer, ProtectInputs, Random, Rule, mdgd_backward

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, HALF = 4, 2


def prompts(rank: int, world: int, count: int = 2) -> list[dict[str, Tensor]]:
    """What an anchor is calibrated with: this process's part."""
    return [setups.llava_part(1000 + i, rank, world, setups.ALL_WITH[0]) for i in range(count)]


@functools.cache
def surgery() -> type[Rule]:
    """The rule of the example, which trains for some steps as it is read."""
    sys.path.insert(0, str(EXAMPLES))
    with redirect_stdout(StringIO()):
        found: type[Rule] = runpy.run_path(str(EXAMPLES / "own_rule.py"))["Surgery"]
    return found


def anchored(
    strength: float = 2.0, calibrated: bool = False, inner: Callable[[], Rule] | None = None, **settings: Any
) -> dict[str, Any]:
    def rule(net: nn.Module, rank: int, world: int) -> Rule:
        anchor = Anchor(net, strength, rule=None if inner is None else inner(), **settings)
        group = dist.group.WORLD if world > 1 else None
        return anchor.calibrate(prompts(rank, world), group=group) if calibrated else anchor

    return {"rule": rule}


def of(make: Callable[[nn.Module], Rule]) -> dict[str, Any]:
    return {"rule": lambda net, rank, world: make(net)}


# Of widths 16 and 24, some with a 1 for a bias. Twice this rank is no less, so that the sums of parts lose nothing; the
# rank itself is, so that some directions are left to the rest.
RANK = 13
ANCHORS = {
    "anchor": anchored(rank=None, warmup=3),
    "anchor, calibrated": anchored(calibrated=True, rank=RANK),
    "anchor, compact": {**anchored(calibrated=True, rank=None), "mask": Random(0.3), "compact": True},
    "anchor of lora": {**anchored(0.1, rank=RANK, warmup=3), "lora": True},
}
# What is left out or measured at some steps alone is inside an anchor.
FORMS: dict[str, dict[str, Any]] = {
    "budget": of(lambda net: DriftBudget(MDGD(), 0.02)),
    "inputs": of(lambda net: ProtectInputs(net, 0.7, refresh=2)),
    "align": of(lambda net: MDGD(0.5, regularize=0)),
    **ANCHORS,
    "anchor and lazy": anchored(rank=RANK, warmup=3, every=2, inner=lambda: MDGD(0.5, 0, every=3)),
    "anchor and budget, lora": {
        **anchored(0.1, rank=None, warmup=1, inner=lambda: DriftBudget(MDGD(1, 0), 0.02, measure_every=2)),
        "lora": True,
    },
    "surgery": of(lambda net: surgery()(0.5)),
}
# No L_v, which is taken in float32.
EXACT = ("inputs", *ANCHORS)
# By step: which of the four rows have a picture. The first half has a step at which features have moved.
PICTURES = {
    "ddp": setups.SOME_WITHOUT,
    "fsdp": setups.ALL_WITH,
}
CASES = [(kind, form) for kind in PICTURES for form in FORMS]
# All that hold something, in shards. In DDP each process holds, and saves, what one does: three stand for all.
RESUMED = [("fsdp", form) for form in FORMS if form not in ("align", "surgery")]
RESUMED += [("ddp", form) for form in ("inputs", "anchor, compact", "anchor and budget, lora")]


def lora() -> nn.Module:
    """With B that is not zero, so that A learns, too."""
    net, parameters = adapted()
    move(parameters)
    found: nn.Module = net
    return found


def build(kind: str, form: str, rank: int = 0, world: int = 1) -> tuple[nn.Module, MDGDOptimizer]:
    settings = FORMS[form]
    net = lora() if settings.get("lora") else setups.tiny_llava()
    model = net
    if kind == "ddp":
        model = DistributedDataParallel(net)
    elif kind == "fsdp":
        llava: Any = net.get_base_model() if settings.get("lora") else net
        for module in (*llava.model.language_model.layers, llava.model.multi_modal_projector):
            fully_shard(module)
        # Freed after the forward pass, or not: one backward pass of both losses begins with all of the model.
        fully_shard(net, reshard_after_forward=form in ("align", "anchor") or None)
    # Adapters of so small a model move slowly, and features of float32 have to tell of it.
    rate = 1.0 if settings.get("lora") else 0.1
    base = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    more = {name: settings[name] for name in ("mask", "compact") if name in settings}
    return model, MDGDOptimizer(base, settings["rule"](net, rank, world), **more)


def train(
    model: nn.Module, optimizer: MDGDOptimizer, pictures: Any, rank: int, world: int, steps: Sequence[int]
) -> dict[str, Any]:
    """Two micro-batches and one in turn; returns whole weights, what the rule holds, and diagnostics."""
    for step in steps:
        count = 2 - step % 2
        for i in range(count):
            batch = setups.llava_part(10 * step + i, rank, world, pictures[step])
            mdgd_backward(model, optimizer, batch, alignment="mse", weight=1 / count, combine=i == count - 1)
        optimizer.step()
        optimizer.zero_grad()
    weights = [setups.whole(p) for p in model.parameters() if p.requires_grad]
    return {"weights": weights, "held": held(optimizer.rule), "diagnostics": optimizer.diagnostics}


def held(rule: Any) -> dict[str, list[Tensor]]:
    """What a rule knows of inputs and features: sums, and what is made of them."""
    if isinstance(rule, ProtectInputs):
        return {"sums": list(rule.covariances.values()), "spans": [q @ q.T for q in rule.bases.values()]}
    inner = rule.rule if isinstance(rule, Anchor) else rule
    found = [inner.pull, inner.strength, inner.ratio] if isinstance(inner, DriftBudget) else []
    found += [torch.tensor(inner.age % inner.every)] if isinstance(inner, MDGD) else []
    if not isinstance(rule, Anchor):
        return {"sums": found, "spans": []}
    covariances = [rule.covariances.of(layer) for layer in rule.layers]
    # Rows of a low rank may be turned: what they make of a matrix is compared.
    spans = [c.after([torch.eye(c.matrix.shape[1], dtype=c.matrix.dtype)])[0] for c in covariances]
    sizes = [x for key, held in rule.covariances.moments.items() for x in (held.size, rule.covariances.answers[key])]
    return {"sums": [*found, *sizes, torch.tensor([rule.covariances.seen, rule.steps])], "spans": spans}


def whole(kind: str, form: str, folder: Path) -> dict[str, Any]:
    """In one process all steps, saved on the way for two to go on with."""
    parts = build("alone", form)
    train(*parts, PICTURES[kind], 0, 1, range(HALF))
    if (kind, form) in RESUMED:
        dcp.save(checkpoints.state(*parts), checkpoint_id=folder / f"one {kind} {form}")
    return train(*parts, PICTURES[kind], 0, 1, range(HALF, STEPS))


def resumed(
    form: str, pictures: Any, folder: Path, kind: str = "alone", rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """The other half, with what was saved."""
    parts = build(kind, form, rank, world)
    checkpoints.restore(*parts, folder)
    return train(*parts, pictures, rank, world, range(HALF, STEPS))


def alone(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(kind, form): whole(kind, form, folder) for kind, form in CASES}


def in_two(kind: str, form: str, folder: Path, rank: int, world: int) -> dict[str, Any]:
    """All steps; or half of them, saved for one process to go on with, and the other half with what one saved."""
    parts, pictures = build(kind, form, rank, world), PICTURES[kind]
    if (kind, form) not in RESUMED:
        return train(*parts, pictures, rank, world, range(STEPS))
    train(*parts, pictures, rank, world, range(HALF))
    dcp.save(checkpoints.state(*parts), checkpoint_id=folder / f"two {kind} {form}")
    return resumed(form, pictures, folder / f"one {kind} {form}", kind, rank, world)


def run(case: Callable[..., None], folder: Path, rank: int, world: int) -> None:
    for kind, form in CASES:
        case(f"rule, {kind}, {form}", in_two, kind, form, folder, rank, world)

"""Several processes, exact: what one process would compute from the combined batch.

``fully_shard`` (FSDP2) sums gradients as they are made; what looks across a tensor is in
:mod:`torch_mdgd.parallel.dtensor`. Under ``DistributedDataParallel`` every rank holds every element, and the gradients
of each rank's part of the batch are averaged before they are combined, which is not linear in them.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torch_mdgd.parallel.dtensor import is_sharded

Group: TypeAlias = Any

# How many gradients are averaged in one message.
BUCKET = 1 << 23

UNSUPPORTED = {
    "deepspeed": "DeepSpeed's engine keeps gradients in buffers of its own and steps by itself, so put "
    "torch_mdgd.integrations.deepspeed.MDGDEngine around it",
    "torch.distributed.fsdp.fully_sharded_data_parallel": "FullyShardedDataParallel (FSDP1) mixes parameters in flat "
    "shards, whose inner products it cannot tell apart",
    "torch.nn.parallel.data_parallel": "DataParallel runs copies of the model, where its features cannot be tapped",
}
INSTEAD = "use DistributedDataParallel or torch.distributed.fsdp.fully_shard (FSDP2)"


class Ranks:
    """The processes that train a model together, each on its own part of the batch.

    Args:
        model: in DistributedDataParallel, with ``fully_shard`` applied, or of this process alone.
        group: processes that each have such a model of their own, kept equal by averaging its gradients.

    Attributes:
        modules: of the model.
        parameters: of the model; one that modules share is there several times.

    Raises:
        TypeError: a kind of parallelism that is not supported.
        ValueError: DistributedDataParallel with ``static_graph=True``.
    """

    def __init__(self, model: nn.Module, group: Group | None = None) -> None:
        # Walked through once: on a model of many small modules a walk takes as long as some of them.
        self.modules = list(model.modules())
        self.parameters = [p for m in self.modules for p in m._parameters.values() if p is not None]
        _refuse_modules(self.modules)
        self.ddp = next((m for m in self.modules if isinstance(m, DistributedDataParallel)), None)
        mesh: Any = next((getattr(p, "device_mesh", None) for p in self.parameters if is_sharded(p)), None)
        self.sharded = mesh is not None
        self.groups: list[Group] = [mesh.get_group(dim) for dim in range(mesh.ndim)] if self.sharded else []
        if self.ddp is not None:
            if self.ddp.static_graph:
                raise ValueError("static_graph=True of DistributedDataParallel expects one backward pass: use False")
            self.groups = [self.ddp.process_group]
        elif group is not None and not self.sharded:
            self.groups = [group]

    @property
    def group(self) -> Group | None:
        """The processes whose gradients are averaged; None with FSDP2, which sums them itself, or alone."""
        return self.groups[0] if self.groups and not self.sharded else None

    def require_averaging(self, framework: str | None = None) -> None:
        """Warn if there are other processes, and nobody averages gradients over them.

        Args:
            framework: the class that a framework has put around the optimizer. A framework keeps processes alike, so
                that a model which it does not wrap is an error.

        Raises:
            ValueError: a framework runs several processes, whose gradients nobody averages.
        """
        if self.groups or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        world = torch.distributed.get_world_size()
        if world > 1 and framework is not None:
            raise ValueError(
                f"mdgd_backward: {framework} is of a framework that runs {world} processes, and the model is neither "
                "in DistributedDataParallel nor sharded, so nobody would average its gradients. Pass the model as the "
                "framework has wrapped it, or call average_over(process_group of that) of the MDGDOptimizer once"
            )
        if world > 1:
            warnings.warn(
                f"mdgd_backward: there are {world} processes, but the model is neither in DistributedDataParallel nor "
                "sharded, so gradients stay this process's own. Pass the wrapped model, or call "
                "optimizer.average_over(group); if each process trains a model of its own, filter this warning",
                stacklevel=3,
            )

    def no_sync(self) -> AbstractContextManager[None]:
        """Backward passes inside leave this rank's own gradients: DDP reduces only the first after its forward pass.

        With ``fully_shard`` they leave the shards of their sum, in every micro-batch: what frameworks have put off
        until the last one, as accelerate's ``accumulate`` does, would be missing.
        """
        modules: list[Any] = self.modules if self.sharded else []
        for module in modules:
            if hasattr(module, "set_requires_gradient_sync"):
                module.set_requires_gradient_sync(True, recurse=False)
        return nullcontext() if self.ddp is None else self.ddp.no_sync()

    def share(self, tokens: Tensor) -> tuple[bool, float]:
        """Whether any rank has image tokens, and the weight of this rank's mean in the mean over ranks.

        With it that mean is the mean over all ranks' tokens, however they are divided.

        Raises:
            RuntimeError: sharded parameters, and some ranks have image tokens while others have none.
        """
        if not self.groups:
            return bool(tokens), 1.0
        counts = torch.stack([tokens, (tokens == 0).long(), torch.ones_like(tokens)])
        own, (total, without, ranks) = int(tokens), self._sum(counts).tolist()
        if self.sharded and 0 < without < ranks:
            raise RuntimeError(
                "mdgd_backward: some ranks have image tokens and others have none. With fully_shard every rank has to "
                "run the same modules, or their collectives wait for each other: draw batches so that all ranks, or "
                "none, have pictures"
            )
        return total > 0, own * ranks / total if total else 1.0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over ranks."""
        if not self.groups:
            return value
        total, ranks = self._sum(torch.stack([value, torch.ones_like(value)])).unbind()
        return total / ranks

    def _sum(self, values: Tensor) -> Tensor:
        for group in self.groups:
            torch.distributed.all_reduce(values, group=group)
        return values


@torch.no_grad()
def average_(kinds: Sequence[list[Tensor | None]], parameters: Sequence[Tensor], group: Group) -> None:
    """Average each gradient over ranks, in place. A rank that lacks a gradient counts as zero, and gets the mean too.

    Args:
        kinds: lists of T gradients, of the same kinds on all ranks.
        parameters: T tensors.
        group: the ranks.
    """
    there = [[x is not None for x in kind] for kind in kinds]
    here = torch.tensor(there, dtype=torch.int32, device="cpu")
    anywhere = here.to(parameters[0].device)
    torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX, group)
    for kind, row in zip(kinds, anywhere.tolist(), strict=True):
        kind[:] = [torch.zeros_like(p) if x is None and i else x for p, x, i in zip(parameters, kind, row, strict=True)]
    ranks = torch.distributed.get_world_size(group)
    for bucket in _buckets([x for kind in kinds for x in kind if x is not None]):
        flat = torch.cat([x.reshape(-1) for x in bucket]).div_(ranks)
        torch.distributed.all_reduce(flat, group=group)
        for x, part in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
            x.copy_(part.view(x.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for x in tensors:
        if bucket and (x.dtype != bucket[0].dtype or sum(y.numel() for y in bucket) + x.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(x)
    if bucket:
        yield bucket


@contextmanager
def resharded(parameters: Sequence[Tensor], model: nn.Module | None) -> Iterator[None]:
    """Values of sharded parameters may be written before and inside: gathered copies are dropped at both ends.

    Raises:
        ValueError: parameters are sharded, and there is no model.
    """
    modules: list[Any] = []
    if any(map(is_sharded, parameters)):
        if model is None:
            raise ValueError("reference: parameters are sharded, so pass the model, whose gathered copies are dropped")
        modules = [m for m in model.modules() if hasattr(m, "reshard")]
    for module in modules:
        module.reshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


def gather_around(inner: nn.Module, model: nn.Module) -> None:
    """Gather the modules sharded by ``fully_shard`` that hold an inner one, for a backward pass that begins at it.

    A sharded module gathers its parameters when a backward pass goes through its output. This one does not, and would
    read memory that was freed.
    """
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "unshard")]
    for module in modules:
        if any(m is inner for m in module.modules()):
            module.unshard()


def refuse_model(model: nn.Module) -> None:
    """Raise a TypeError if the model is in a kind of parallelism that is not supported."""
    _refuse_modules(model.modules())


def _refuse_modules(modules: Iterable[nn.Module]) -> None:
    for kind in {type(module) for module in modules}:
        for base in kind.__mro__:
            for origin, why in UNSUPPORTED.items():
                if f"{base.__module__}.".startswith(f"{origin}."):
                    raise TypeError(f"{kind.__name__} is not supported: {why}; {INSTEAD}")


def refuse_optimizer(base: Optimizer) -> None:
    """Raise a TypeError if an optimizer or its parameters are partitioned by ZeRO, DeepSpeed or FSDP1."""
    parameters = [p for group in base.param_groups for p in group["params"]]
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(base).__mro__):
        raise TypeError(
            "ZeroRedundancyOptimizer cannot be wrapped: its state is in another optimizer, for a part of the "
            "parameters, where a mask or a checkpoint would miss it; use torch.distributed.fsdp.fully_shard (FSDP2), "
            "which shards state and φ"
        )
    for attribute, origin in zip(("ds_id", "_fsdp_flattened"), UNSUPPORTED, strict=False):
        if any(hasattr(p, attribute) for p in parameters):
            raise TypeError(f"the parameters cannot be wrapped: {UNSUPPORTED[origin]}; {INSTEAD}")

"""What DeepSpeed's engine cannot do exactly, told by name with what to use instead."""

from typing import Any

import torch

from torch_mdgd.integrations.deepspeed.partition import is_partitioned
from torch_mdgd.models.tap import Batch, pictures_in
from torch_mdgd.parallel.ranks import Ranks
from torch_mdgd.rules.anchor import Anchor
from torch_mdgd.rules.around import Around
from torch_mdgd.rules.base import PREFIX, Rule

FSDP2 = "use fully_shard (FSDP2), by hand, in accelerate or in MDGDTrainer"


def require_alike(batch: Batch, ranks: Ranks, device: torch.device) -> None:
    """Raise a RuntimeError if some processes' batches have pictures and others' have none."""
    here = bool(pictures_in(batch))
    mean = float(ranks.mean(torch.tensor(float(here), dtype=torch.float32, device=device)))
    if 0 < mean < 1:
        raise RuntimeError(
            "MDGDEngine: some processes' batches have pictures and others' have none. DeepSpeed reduces gradients in "
            "the order of the modules that ran, which has to be the same everywhere: draw batches so that all of them "
            "have pictures or none, or give text a blank picture that no token stands for"
        )


def refuse_engine(engine: Any) -> None:
    """Raise a TypeError for what is no engine, a ValueError for one without ZeRO or with an option that hides φ."""
    if not hasattr(engine, "zero_optimization_stage") or not hasattr(engine, "module"):
        raise TypeError(f"MDGDEngine takes the engine of deepspeed.initialize, not {type(engine).__name__}")
    if engine.zero_optimization_stage() not in (1, 2, 3):
        raise ValueError(
            "MDGDEngine: the engine has no ZeRO: use stage 1, 2 or 3, or DistributedDataParallel with MDGDOptimizer"
        )
    partitioned = [p for p in engine.module.parameters() if p.requires_grad and is_partitioned(p)]
    config = engine.config.get("zero_optimization", {})
    found = {
        "parameters offloaded to NVMe": (config.get("offload_param") or {}).get("device") == "nvme",
        "zero_hpz_partition_size above 1": int(config.get("zero_hpz_partition_size") or 1) > 1,
        "zero_quantized_weights": bool(config.get("zero_quantized_weights")),
        "mics_shard_size": int(config.get("mics_shard_size") or -1) > 0,
    }
    for name, present in found.items():
        if present and partitioned:
            raise ValueError(
                f"MDGDEngine does not support {name}, which holds parameters in other places too, where φ would be "
                f"missed: leave it out, or {FSDP2}"
            )


def refuse_rule(rule: Any) -> None:
    """Raise a TypeError for what is no rule, a ValueError for one that needs all parameters at once."""
    if not isinstance(rule, Rule):
        raise TypeError(f"MDGDEngine: rule must be a Rule such as MDGD(), or None, got {rule!r}")
    if rule.corrects:
        raise ValueError(
            f"MDGDEngine does not support {rule}, which corrects parameters after the optimizer's step: DeepSpeed's "
            f"step is in partitions of flat float32 copies. Use MDGD, Project, Anchor or DriftBudget, or {FSDP2}"
        )
    found: Any = rule
    while True:
        if type(found).pull_ not in (Rule.pull_, Around.pull_, Anchor.pull_):
            raise ValueError(f"MDGDEngine does not support {found}, whose pull_ needs all parameters at once: {FSDP2}")
        if not isinstance(found, Around):
            return
        found = found.rule


def refuse_groups(engine: Any) -> None:
    """Raise a ValueError for a parameter group with weights of its own."""
    for group in engine.optimizer.param_groups:
        own = [key for key in group if isinstance(key, str) and key.startswith(PREFIX)]
        if own:
            raise ValueError(
                f"MDGDEngine: a parameter group has {own[0]!r}, and the rule's weights are the same for all parameters "
                f"here: leave it out, or {FSDP2}"
            )

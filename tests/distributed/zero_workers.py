"""Two processes that go through the cases of DeepSpeed and write what each found to a file."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.pair import WORLD
from tests.distributed.setups import error


def run(rank: int, folder: Path) -> None:
    # What a launcher sets.
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= {**ranks, **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(WORLD))}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29513"}
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # It would compile a reduction in shared memory; gloo's is there already.
    deepspeed.ops.__compatible_ops__ = {}
    from tests.distributed import zero

    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    deepspeed.init_distributed("gloo", dist_init_required=False)
    found: dict[str, Any] = {}

    def case(name: str, function: Callable[..., Any], *args: Any) -> None:
        try:
            found[name] = function(*args)
        except Exception:
            found[name] = traceback.format_exc()

    zero.run(case, error, folder, rank, WORLD)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()

"""Two processes, forked from one that has imported what they need."""

import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

WORLD = 2


def outcomes(function: Callable[[int, Path], None], folder: Path) -> list[dict[str, Any]]:
    """What each process wrote to ``RANK.pt`` in the folder; ``function`` takes its rank and the folder."""
    # Not forked from this process, whose tests may have started threads.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.distributed.workers"])
    torch.multiprocessing.start_processes(_start, (function, folder), nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _start(rank: int, function: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    # As in the tests' own process.
    gc.freeze()
    function(rank, folder)

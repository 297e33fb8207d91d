"""One row in several processes, each on a GPU of its own, as `torchrun` starts them.

They train together, each on its part of a step's batches, and measure different tasks at a time. The first of them
writes what is no task's. One process alone makes no group.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

# A process may wait as long as another measures a task; one that dies takes the others with it, by torchrun.
LONGEST = timedelta(days=7)


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one that writes."""
    return world() == 1 or int(os.environ["RANK"]) == 0


def join() -> None:
    """Take part in the group of all processes, with a GPU of this one's own."""
    cuda = torch.cuda.is_available()
    if world() > 1 and cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if world() > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if cuda else "gloo", timeout=LONGEST)


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        distributed.barrier()


def agree(value: Any) -> Any:
    """The first process's value, on all of them."""
    if world() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


@contextmanager
def in_turn() -> Iterator[None]:
    """The first process goes through the block before all others do; what it raises leaves them waiting."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()

"""A list of parameters as a table of chunks, and the threads that share them out."""

from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from torch_mdgd.kernels.compiled import kernels
from torch_mdgd.kernels.types import Tensors

T = TypeVar("T")
Array: TypeAlias = np.ndarray[Any, Any]

# Numbers in a chunk: some vectors' fit into a core's first cache together.
CHUNK = 4096
# Bytes.
CACHE_LINE = 64
# A thread is worth starting for so many chunks.
LEAST = 64
DTYPES = {
    torch.float32: kernels.FLOAT32,
    torch.bfloat16: kernels.BFLOAT16,
    torch.float16: kernels.FLOAT16,
    torch.float64: kernels.FLOAT64,
    torch.bool: kernels.BOOL,
}


def contiguous(tensors: Tensors) -> list[Tensor | None]:
    """The tensors, or contiguous copies of those that are not."""
    return [x if x is None or x.is_contiguous() else x.contiguous() for x in tensors]


def addresses(lists: Sequence[Tensors]) -> tuple[Array, Array]:
    """Where the tensors are, and their dtypes.

    Args:
        lists: V vectors of T contiguous tensors or None.

    Returns:
        addresses, int64, 0 for None; dtypes as ``kernels`` numbers them, int64; both of shape (T, V).
    """
    at = [[0 if x is None else x.data_ptr() for x in tensors] for tensors in lists]
    kinds = [[0 if x is None else DTYPES[x.dtype] for x in tensors] for tensors in lists]
    return tuple(np.array(x, dtype=np.int64).reshape(len(lists), -1).T.copy() for x in (at, kinds))  # type: ignore[return-value]


def lengths(*lists: Tensors) -> Array:
    """Of each of T parameters, 0 where no vector has it: int64, shape (T,)."""
    found = np.zeros(len(lists[0]), dtype=np.int64)
    for tensors in lists:
        found = np.maximum(found, np.array([0 if x is None else x.numel() for x in tensors], dtype=np.int64))
        if found.all():
            break
    return found


def cut(numels: Array, chosen: Array) -> Array:
    """The chunks of some of T parameters, in order: int64, shape (N, 3): parameter, first number, numbers.

    Args:
        numels: int64, shape (T,).
        chosen: bool, shape (T,).
    """
    counts = np.where(chosen, -(-numels // CHUNK), 0)
    t = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    start = (np.arange(len(t), dtype=np.int64) - np.repeat(counts.cumsum() - counts, counts)) * CHUNK
    return np.stack([t, start, np.minimum(numels[t] - start, CHUNK)], axis=1)


def scratch(rows: int, dtype: type) -> Array:
    """Room for a chunk of each of so many vectors, shape (rows, CHUNK), from the beginning of a cache line on.

    numpy's own memory begins at any 16 bytes: off a multiple of 32 combinations of 16-bit numbers took a tenth longer.
    """
    size = rows * CHUNK * np.dtype(dtype).itemsize
    room = np.empty(size + CACHE_LINE, dtype=np.uint8)
    begin = -room.ctypes.data % CACHE_LINE
    return room[begin : begin + size].view(dtype).reshape(rows, CHUNK)


def spread(run: Callable[[int, int], T], chunks: int) -> list[T]:
    """Let threads run (first, end) for stretches of so many chunks that are all of them; the results, in order."""
    threads = max(1, min(torch.get_num_threads(), chunks // LEAST))
    edges = [chunks * i // threads for i in range(threads + 1)]
    results: dict[int, T] = {}

    def work(i: int) -> None:
        results[i] = run(edges[i], edges[i + 1])

    # Anew for each list, which is large: nothing is left over that a fork of the process would break.
    others = [Thread(target=work, args=(i,)) for i in range(1, threads)]
    for thread in others:
        thread.start()
    work(0)
    for thread in others:
        thread.join()
    return [results[i] for i in range(threads)]

"""Memory in bytes, measured twice: the storages of live tensors, and the peak that the allocator saw."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Storages = dict[int, int]


def storages(tensors: Iterable[Tensor | None]) -> Storages:
    """Identity and bytes of each storage under these tensors, views and shared ones once; meta tensors too."""
    # A list: a storage that died meanwhile would lend its identity to the next one.
    found = [x.untyped_storage() for x in tensors if x is not None]
    return {s._cdata: s.nbytes() for s in found if s.nbytes()}


@contextmanager
def fresh() -> Iterator[None]:
    """Inside, :func:`live` sees what was made inside alone, and need not walk everything that was imported.

    What the caller had frozen stays so.
    """
    thaw = gc.get_freeze_count() == 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if thaw:
            gc.unfreeze()


def live() -> list[Tensor]:
    """Every tensor that Python can reach, gradients included."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    return found + [x.grad for x in found if x.is_leaf and x.grad is not None]


def tensors_in(value: object) -> list[Tensor]:
    """The tensors inside nested dicts, lists and tuples, as optimizer states are."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in tensors_in(part)] if isinstance(value, list | tuple) else []


def peak(run: Callable[[], object]) -> int:
    """Bytes that the CPU allocator gave out at the worst moment of ``run``, beyond those it had given out before.

    Temporaries inside torch's own operations count; what was allocated before and is freed meanwhile does not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results
    events = ((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = highest = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        highest = max(highest, held)
    return highest

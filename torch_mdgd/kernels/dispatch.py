"""Which backend runs: the tensors' device decides, unless ``TORCH_MDGD_BACKEND`` or :func:`use_backend` does."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from torch_mdgd.kernels import eager, oracle

VARIABLE = "TORCH_MDGD_BACKEND"


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _for_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.version.hip is None and _triton_installed()


def _triton() -> ModuleType:
    # An import statement, which torch.compile follows, as it does not follow importlib.
    from torch_mdgd.kernels import triton

    return triton


class Backend(NamedTuple):
    """A module with the four operations, and which tensors it is for."""

    load: Callable[[], ModuleType]
    suits: Callable[[Tensor], bool]


# The first that is for a tensor is taken; the oracle only if asked for.
BACKENDS: dict[str, Backend] = {
    "triton": Backend(_triton, _for_cuda),
    "eager": Backend(lambda: eager, lambda tensor: True),
    "oracle": Backend(lambda: oracle, lambda tensor: False),
}

# A plain global, which torch.compile can guard on.
_forced: str | None = None


def backend_for(tensor: Tensor | None) -> str:
    """The name of the backend that runs for a list whose first tensor this is (None: for a list without any).

    It is what :func:`use_backend` says, else what the environment variable TORCH_MDGD_BACKEND says, else
    ``"triton"`` for a CUDA tensor if Triton is installed, else ``"eager"``.

    Raises:
        ValueError: the environment variable names no backend.
    """
    name = _forced or os.environ.get(VARIABLE)
    if name:
        return _known(name, f"the environment variable {VARIABLE}")
    if tensor is None:
        return "eager"
    return next(name for name, backend in BACKENDS.items() if backend.suits(tensor))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every kernel inside the ``with`` block on one backend: ``"oracle"``, ``"eager"`` or ``"triton"``.

    Raises:
        ValueError: there is no such backend.
    """
    global _forced
    before, _forced = _forced, _known(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def backend_module(*lists: Sequence[Tensor | None]) -> ModuleType:
    """The module that implements the operations for these lists of tensors."""
    first = next((x for tensors in lists for x in tensors if x is not None), None)
    name = backend_for(first)
    # One launch reads the memory of one device: a model that is spread over several would have it read another's.
    if name == "triton" and len({x.device for tensors in lists for x in tensors if x is not None}) > 1:
        name = "eager"
    return BACKENDS[name].load()


def _known(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} names the backend {name!r}; there are {', '.join(sorted(BACKENDS))}")
    return name

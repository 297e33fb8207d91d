"""Which backend runs: device and size of a list decide, unless ``TORCH_MDGD_BACKEND`` or :func:`use_backend` does."""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_mdgd.kernels import eager, oracle
from torch_mdgd.kernels.types import Tensors

VARIABLE = "TORCH_MDGD_BACKEND"
# Numbers in a list from which on the compiled backend is worth loading, and as how many more a tensor counts: the eager
# one is slow at many small tensors too.
LARGE, EACH = 1 << 18, 1 << 10


@cache
def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _triton() -> ModuleType:
    # An import statement, which torch.compile follows, as it does not follow importlib.
    from torch_mdgd.kernels import triton

    return triton


def _for_cuda(tensors: Sequence[Tensor]) -> bool:
    return tensors[0].device.type == "cuda" and torch.version.hip is None and _installed("triton")


def _compiled() -> ModuleType:
    from torch_mdgd.kernels import compiled

    return compiled


@cache
def _compiles() -> bool:
    """Whether the compiled backend is there; a warning says so if numba is there and fails."""
    if not _installed("numba"):
        return False
    try:
        _compiled()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"the compiled CPU backend is left out: numba failed ({reason})", stacklevel=2)
        return False
    return True


def _for_large_on_cpu(tensors: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling() or type(tensors[0]) not in (Tensor, nn.Parameter):
        return False
    numbers = 0
    for x in tensors:
        numbers += x.numel() + EACH
        if numbers >= LARGE:
            return x.device.type == "cpu" and _compiles()
    return False


class Backend(NamedTuple):
    """A module with the four operations, and which lists of tensors it is for."""

    load: Callable[[], ModuleType]
    suits: Callable[[Sequence[Tensor]], bool]


# The first that is for a list is taken; the oracle only if asked for.
BACKENDS: dict[str, Backend] = {
    "triton": Backend(_triton, _for_cuda),
    "compiled": Backend(_compiled, _for_large_on_cpu),
    "eager": Backend(lambda: eager, lambda tensors: True),
    "oracle": Backend(lambda: oracle, lambda tensors: False),
}

# A plain global, which torch.compile can guard on.
_forced: str | None = None


def backend_for(tensors: Tensors) -> str:
    """The name of the backend that runs for a vector in these parts.

    It is what :func:`use_backend` says, else what the environment variable TORCH_MDGD_BACKEND says, else
    ``"triton"`` for CUDA tensors if Triton is installed, ``"compiled"`` for large lists on the CPU if numba is, else
    ``"eager"``.

    Raises:
        ValueError: the environment variable names no backend.
    """
    name = _forced or os.environ.get(VARIABLE)
    if name:
        return _known(name, f"the environment variable {VARIABLE}")
    there = [x for x in tensors if x is not None]
    return next(name for name, backend in BACKENDS.items() if backend.suits(there)) if there else "eager"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every kernel inside on one backend: ``"oracle"``, ``"eager"``, ``"compiled"`` or ``"triton"``.

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
    name = backend_for(next((tensors for tensors in lists if any(x is not None for x in tensors)), ()))
    # One launch reads the memory of one device: a model that is spread over several would have it read another's.
    if name == "triton" and len({x.device for tensors in lists for x in tensors if x is not None}) > 1:
        name = "eager"
    if name == "compiled" and not all([x is None or x.is_cpu for tensors in lists for x in tensors]):
        name = "eager"
    return BACKENDS[name].load()


def _known(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} names the backend {name!r}; there are {', '.join(sorted(BACKENDS))}")
    return name

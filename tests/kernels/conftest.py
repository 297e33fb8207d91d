"""Every backend that can run in this process, with blocks so small that short tensors have several.

Triton decides when it is imported whether its kernels are compiled for CUDA or interpreted on the CPU, so one process
has either. Without CUDA, test_triton.py runs these tests again in a process that interprets.
"""

import importlib.util
import os

import pytest
import torch
from hypothesis import Phase, settings

from torch_mdgd import kernels
from torch_mdgd.kernels import eager, selection

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    # A program of a kernel takes the interpreter milliseconds: fewer examples, and a failing one as it was found.
    phases = [phase for phase in Phase if phase != Phase.shrink]
    settings.register_profile("interpreted", settings.get_profile("torch_mdgd"), max_examples=5, phases=phases)
    settings.load_profile("interpreted")


def backends():
    if INTERPRETED:
        return ["triton"]
    names = {"compiled": importlib.util.find_spec("numba") is not None, "triton": torch.cuda.is_available()}
    return ["eager", *(name for name, there in names.items() if there)]


@pytest.fixture(params=backends(), scope="module")
def backend(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "BLOCK", 64)
        patch.setattr(eager, "SMALL", 24)
        patch.setattr(selection, "BLOCK", 64)
        patch.setattr(selection, "COMPUTED_BLOCK", 40)
        patch.setattr(selection, "SAMPLE", 128)
        if request.param == "compiled":
            from torch_mdgd.kernels.compiled import chunks as compiled_chunks

            patch.setattr(compiled_chunks, "CHUNK", 40)
            patch.setattr(compiled_chunks, "LEAST", 1)
            patch.setattr(torch, "get_num_threads", lambda: 2)
        if request.param == "triton":
            from torch_mdgd.kernels.triton import chunks

            # NumPy, which sums in the interpreter, loses more digits in longer sums than a tree does.
            patch.setattr(chunks, "TILE", 64)
        with kernels.use_backend(request.param):
            yield request.param


@pytest.fixture(scope="module")
def device(backend):
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"

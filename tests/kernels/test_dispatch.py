import subprocess
import sys

import pytest
import torch

from torch_mdgd import kernels
from torch_mdgd.kernels import eager, oracle
from torch_mdgd.kernels.dispatch import backend_module


def test_cpu_tensors_run_eagerly():
    assert kernels.backend_for([torch.zeros(1)]) == "eager"
    assert kernels.backend_for([None]) == kernels.backend_for([]) == "eager"


def test_the_environment_variable_decides(monkeypatch):
    monkeypatch.setenv("TORCH_MDGD_BACKEND", "oracle")
    assert kernels.backend_for([torch.zeros(1)]) == "oracle"


def test_the_environment_variable_must_name_a_backend(monkeypatch):
    monkeypatch.setenv("TORCH_MDGD_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="TORCH_MDGD_BACKEND names the backend 'fast'; there are compiled, eager, oracle, triton"
    ):
        kernels.inner_products([[torch.zeros(1)]])


def test_the_context_manager_decides_over_the_environment_variable_and_only_inside(monkeypatch):
    monkeypatch.setenv("TORCH_MDGD_BACKEND", "eager")
    with kernels.use_backend("oracle"):
        assert kernels.backend_for([torch.zeros(1)]) == "oracle"
    assert kernels.backend_for([torch.zeros(1)]) == "eager"


def test_the_context_manager_must_name_a_backend():
    with pytest.raises(ValueError, match="'fast'"), kernels.use_backend("fast"):
        pass


@pytest.mark.parametrize("name", ["oracle", "eager"])
def test_the_named_backend_is_the_one_that_runs(monkeypatch, name):
    table = torch.full((1, 1, 1), 42.0, dtype=torch.float64)
    monkeypatch.setattr({"oracle": oracle, "eager": eager}[name], "inner_products", lambda rows, columns: table)
    with kernels.use_backend(name):
        assert kernels.inner_products([[torch.zeros(1)]]) is table


def test_tensors_on_several_devices_are_not_given_to_one_launch():
    here, elsewhere = torch.zeros(1), torch.zeros(1, device="meta")
    with kernels.use_backend("triton"):
        assert backend_module([here, None], [here]).__name__ == "torch_mdgd.kernels.triton"
        assert backend_module([here, elsewhere]) is backend_module([here], [elsewhere]) is eager


def test_importing_and_running_eagerly_needs_neither_triton_nor_numba():
    program = (
        "import sys; sys.modules['triton'] = sys.modules['numba'] = None\n"
        "import torch, torch_mdgd\n"
        "from torch_mdgd import kernels\n"
        "assert float(kernels.inner_products([[torch.ones(1 << 19)]])) == 1 << 19\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

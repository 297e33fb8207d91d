"""What is the Triton backend's alone: run in the interpreter, by test_triton.py."""

from contextlib import nullcontext

import pytest
import torch

from torch_mdgd import kernels
from torch_mdgd.kernels.triton import chunks


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.setenv("TORCH_MDGD_BACKEND", "triton")


def step(g, v):
    products = kernels.inner_products([g, v])
    removed = -products[:, 0, 1] / products[:, 1, 1]
    kernels.combine_(g, [g, v], torch.stack([torch.ones_like(removed), removed], dim=1))
    return products


def gradients():
    torch.manual_seed(0)
    return [[torch.randn(100), torch.randn(3, 5)] for _ in range(2)]


def test_a_compiled_step_is_one_graph():
    plain, compiled = gradients(), gradients()
    wanted = step(*plain)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    assert torch.equal(got, wanted)
    assert all(torch.equal(x, y) for x, y in zip(compiled[0], plain[0], strict=True))
    assert not torch.equal(plain[0][0], gradients()[0][0])


def test_every_operation_launches_on_the_device_of_its_tensors(monkeypatch):
    # Which needs no GPU to be built.
    assert chunks.on_device(torch.device("cuda:1")).idx == 1
    seen = []
    monkeypatch.setattr(chunks, "on_device", lambda device: seen.append(device) or nullcontext())
    x = [torch.arange(5.0)]
    for operation, arguments in (
        (kernels.inner_products, ([x],)),
        (kernels.combine_, (x, [x], torch.full((1, 1), 2.0, dtype=torch.float64))),
        (kernels.top_k_masks, (x, 2)),
        (kernels.top_k_similarity_masks, (x, x, x, None, 2)),
    ):
        operation(*arguments)
        assert set(seen) == {x[0].device}, operation
        seen.clear()

"""The pull of one layer, in any shape, against autograd's gradient of ½ tr(D C Dᵀ) with a C that was formed."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_mdgd.models.linear import Linear
from torch_mdgd.rules import penalty
from torch_mdgd.rules.moments import Moments

SIZES = st.integers(1, 7)


def draw(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def covariance(x, rank):
    """C of inputs, whole or as the top directions and an even rest: as the library holds it, and formed."""
    held = Moments.of(x, x.shape[1], rank, x).covariance(torch.tensor(2.0, dtype=torch.float64))
    formed = x.T @ x / (2 * len(x))
    if rank is not None and rank < x.shape[1]:
        values, vectors = torch.linalg.eigh(formed)
        values[:-rank] = values[:-rank].mean()
        formed = (vectors * values) @ vectors.T
    return held, formed


def pulled(layer, c, g, now, then, factor):
    """What is added to gradients."""
    out = [None if x is None else x.clone() for x in g]
    penalty.pull_(layer, c, out, now, lambda i: now[i] - then[i], factor)
    return [None if x is None else x - y for x, y in zip(out, g, strict=True)]


@given(SIZES, SIZES, st.none() | SIZES, st.booleans(), st.sampled_from([None, 0, 1]), st.integers(0, 99))
def test_a_plain_layer(rows, width, rank, bias, missing, seed):
    shapes = [(rows, width), (rows,)][: 1 + bias]
    (x,), now, then, g = draw(seed, (9, width)), *(draw(seed + i, *shapes) for i in (1, 2, 3))
    if bias:
        x = torch.cat([x, x.new_ones(9, 1)], dim=1)
    held, C = covariance(x, rank)
    if missing is not None and missing < len(g):
        g[missing] = None
    theta = [p.clone().requires_grad_() for p in now]
    # What has no gradient takes no part in the step, and nothing pulls the other at it.
    moved = [torch.zeros_like(p) if y is None else p - p0 for p, p0, y in zip(theta, then, g, strict=True)]
    D = torch.cat([moved[0], moved[1][:, None]], dim=1) if bias else moved[0]
    # The sum keeps a graph where nothing moves.
    (torch.trace(D @ C @ D.T) / 2 + 0 * sum(p.sum() for p in theta)).backward()
    layer = Linear("layer", torch.nn.Identity(), True, 0, 1 if bias else None, width=width + bias)
    for p, y in zip(theta, pulled(layer, held, g, now, then, 0.7), strict=True):
        assert y is None or torch.allclose(y, 0.7 * p.grad, rtol=1e-9, atol=1e-9)


@given(SIZES, SIZES, SIZES, st.none() | SIZES, st.floats(0.1, 4), st.sampled_from([None, "A", "B"]), st.integers(0, 99))
def test_a_layer_of_lora(rows, width, lora, rank, scale, fixed, seed):
    shapes = {"A": (lora, width), "B": (rows, lora)}
    trained = [name for name in shapes if name != fixed]
    (x,), *both = (draw(seed, (9, width)), *(draw(seed + i, *shapes.values()) for i in (1, 2)))
    now, then = (dict(zip("AB", matrices, strict=True)) for matrices in both)
    if fixed is not None:
        then[fixed] = now[fixed]
    held, C = covariance(x, rank)
    theta = {name: value.clone().requires_grad_() for name, value in now.items()}
    D = scale * (theta["B"] @ theta["A"] - then["B"] @ then["A"])
    (torch.trace(D @ C @ D.T) / 2).backward()
    matrix = {name: {"default": SimpleNamespace(weight=value)} for name, value in now.items()}
    module = SimpleNamespace(lora_A=matrix["A"], lora_B=matrix["B"], scaling={"default": scale})
    places = tuple(trained.index(name) if name in trained else None for name in "AB")
    layer = Linear("layer", module, True, lora=places, adapter="default", width=width)
    ours, reference = [now[name] for name in trained], [then[name] for name in trained]
    g = draw(seed + 4, *(shapes[name] for name in trained))
    for name, y in zip(trained, pulled(layer, held, g, ours, reference, 0.7), strict=True):
        wanted = 0.7 * theta[name].grad
        assert torch.allclose(y, wanted, rtol=1e-9, atol=1e-9 * float(1 + wanted.abs().max()))


@pytest.mark.parametrize("rank", [None, 2])
def test_the_energy_has_the_pull_as_its_gradient(rank):
    (x,), now, then = draw(0, (9, 4)), draw(1, (3, 4)), draw(2, (3, 4))
    held, C = covariance(x, rank)
    layer = Linear("layer", torch.nn.Identity(), True, 0, width=4)
    theta = [p.clone().requires_grad_() for p in now]
    energy = penalty.energy(layer, held, theta, then)
    D = now[0] - then[0]
    assert torch.allclose(energy, torch.trace(D @ C @ D.T), rtol=1e-10)
    (energy / 2).backward()
    (found,) = pulled(layer, held, [torch.zeros_like(now[0])], now, then, 1.0)
    assert torch.allclose(found, theta[0].grad, rtol=1e-10)

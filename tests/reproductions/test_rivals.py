"""The rivals that the study adds, each against a slow form in float64 of the equation in its paper."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy import integrate, optimize
from torch import nn

from reproductions.methods.dare import DARE, DropSettings, dropped
from reproductions.methods.dft import DFT, probability_weighted
from reproductions.methods.dg_hard import DGHard, ShrinkSettings, median_of_noise, shrunk, threshold_coefficient
from reproductions.methods.eaft import EAFT, EntropySettings, entropy_weighted
from reproductions.methods.gate_up import GateUp
from reproductions.methods.mofo import filter_by_momentum
from tests.tiny_models import llava

IGNORED = -100


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_dare_drops_a_share_and_scales_the_rest():
    change = random(200, 50)
    found = dropped(change, 0.8, torch.Generator().manual_seed(3))
    kept = found != 0
    torch.testing.assert_close(found[kept], change[kept] / 0.2)
    # Of 10,000 numbers: six standard deviations.
    assert float(kept.double().mean()) == pytest.approx(0.2, abs=6 * math.sqrt(0.2 * 0.8 / 10_000))
    assert torch.equal(dropped(change, 0.0, torch.Generator()), change)


def finished(method, module, before):
    method.finish(SimpleNamespace(pretrained=before), module)
    return {name: p.detach() for name, p in module.named_parameters()}


def test_dare_leaves_what_was_not_trained():
    module = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 5))
    module[1].requires_grad_(False)
    before = {name: p.detach().clone() + 1 for name, p in module.named_parameters()}
    fixed = module[1].weight.clone()
    after = finished(DARE(DropSettings(share=0.5, seed=1)), module, before)
    assert torch.equal(after["1.weight"], fixed)
    moved = after["0.weight"] - before["0.weight"]
    assert 0.3 < float((moved == 0).float().mean()) < 0.7
    torch.testing.assert_close(moved[moved != 0], torch.full_like(moved[moved != 0], -2.0))


def density(x, beta):
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    return math.sqrt(max(0, (high - x) * (x - low))) / (2 * math.pi * beta * x)


@pytest.mark.parametrize("beta", [0.1, 1 / 3, 0.75])
def test_half_of_the_noise_lies_below_its_median(beta):
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def below(x):
        return integrate.quad(density, low, x, args=(beta,))[0]

    assert below(high) == pytest.approx(1, abs=1e-6)
    assert median_of_noise(beta) == pytest.approx(math.sqrt(optimize.brentq(lambda x: below(x) - 0.5, low, high)), 1e-4)


def test_the_threshold_of_square_matrices_is_the_published_one():
    assert threshold_coefficient(1.0) == pytest.approx(4 / math.sqrt(3))
    # Gavish and Donoho: 2.858 times the median singular value, where the noise is not known.
    assert threshold_coefficient(1.0) / median_of_noise(1.0) == pytest.approx(2.858, abs=1e-3)


def test_dg_hard_keeps_what_stands_out_of_noise():
    signal = 3 * torch.outer(random(40, seed=1), random(60, seed=2)) / 8
    change = signal + 0.1 * random(40, 60, seed=3)
    values, vectors = torch.linalg.eigh(change @ change.T)
    tau = threshold_coefficient(2 / 3) * values.sqrt().sort().values[19] / median_of_noise(2 / 3)
    strong = vectors[:, values.sqrt() > tau]
    assert strong.shape[1] == 1
    torch.testing.assert_close(shrunk(change), strong @ strong.T @ change)
    torch.testing.assert_close(shrunk(change, 0.0), change)
    assert float(shrunk(change, 1e6).abs().max()) == 0


def test_dg_hard_shrinks_large_matrices_alone():
    module = nn.Sequential(nn.Linear(40, 60), nn.Linear(4, 4))
    before = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    after = finished(DGHard(ShrinkSettings(scale=1e6)), module, before)
    assert float(after["0.weight"].abs().max()) == 0
    assert all(torch.equal(after[name], start[name]) for name in ("0.bias", "1.weight", "1.bias"))


def said():
    """Logits, and labels of five answer tokens in two rows of unequal length."""
    logits = 3 * random(2, 5, 30)
    labels = torch.tensor([[IGNORED, IGNORED, 3, 7, 0], [IGNORED, IGNORED, IGNORED, 9, 1]])
    places = [(row, at) for row in range(2) for at in range(1, 5) if labels[row, at] != IGNORED]
    return logits, labels, places


def probabilities(logits):
    exps = [math.exp(x) for x in logits.tolist()]
    return [x / sum(exps) for x in exps]


def test_eaft_weighs_each_token_by_the_entropy_of_the_likeliest():
    logits, labels, places = said()
    terms = []
    for row, at in places:
        p = probabilities(logits[row, at - 1])
        top = sorted(p, reverse=True)[:20]
        q = [x / sum(top) for x in top]
        terms.append(-sum(x * math.log(x) for x in q) / math.log(20) * -math.log(p[labels[row, at]]))
    assert float(entropy_weighted(logits, labels)) == pytest.approx(sum(terms) / 5, rel=1e-5)
    even = torch.zeros(1, 3, 30)
    assert float(entropy_weighted(even, torch.tensor([[IGNORED, IGNORED, 4]]))) == pytest.approx(math.log(30), rel=1e-5)


def test_dft_weighs_each_token_by_its_probability_and_not_its_gradient():
    logits, labels, places = said()
    logits.requires_grad_()
    loss = probability_weighted(logits, labels)
    expected, gradient = 0.0, torch.zeros_like(logits)
    for row, at in places:
        p, right = probabilities(logits[row, at - 1]), int(labels[row, at])
        expected -= p[right] * math.log(p[right]) / 5
        gradient[row, at - 1] = p[right] / 5 * (torch.tensor(p, dtype=torch.float64) - torch.eye(30)[right])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "form"),
    [(DFT(), probability_weighted), (EAFT(EntropySettings(top=9)), lambda *args: entropy_weighted(*args, 9))],
)
def test_a_weighted_loss_takes_the_place_of_the_task_loss(method, form):
    logits, labels, _ = said()
    output = SimpleNamespace(logits=logits, loss=torch.tensor(5.0))
    added = method.divergence(None, None)({"labels": labels})(output)
    torch.testing.assert_close(output.loss + added, form(logits, labels))


def test_mofo_moves_the_numbers_with_the_largest_momentum():
    start, share, rate = random(6, 5), 0.2, 0.1
    weight, bias = nn.Parameter(start.clone()), nn.Parameter(random(5, seed=8))
    free = bias.detach().clone()
    optimizer = torch.optim.AdamW([weight, bias], lr=rate, weight_decay=0.0)
    filter_by_momentum(optimizer, share)
    theta, m, v = start.clone(), torch.zeros(6, 5).double(), torch.zeros(6, 5).double()
    for step in range(1, 4):
        g = random(6, 5, seed=step)
        weight.grad, bias.grad = g.clone(), torch.ones(5).double()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        move = rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        for at in m.abs().flatten().argsort(descending=True)[: int(share * 30)].tolist():
            theta[at // 5, at % 5] -= move[at // 5, at % 5]
        torch.testing.assert_close(weight.detach(), theta)
    assert bool((bias != free).all()), "vectors move freely"


def test_mofo_takes_sgds_momentum_too_and_refuses_what_has_none():
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.SGD([p], lr=1.0, momentum=0.9)
    filter_by_momentum(optimizer, 0.25)
    p.grad = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
    optimizer.step()
    assert p.tolist() == [[0, 3], [0, 0]]
    plain = torch.optim.SGD([p], lr=1.0)
    filter_by_momentum(plain, 0.5)
    with pytest.raises(KeyError, match="SGD has no momentum"):
        plain.step()
    with pytest.raises(ValueError, match="share"):
        filter_by_momentum(optimizer, 0.0)
    with pytest.raises(ValueError, match="weight_decay"):
        filter_by_momentum(torch.optim.AdamW([p], weight_decay=0.1), 0.5)


def test_gate_and_up_alone_are_trained():
    model = GateUp().mark(llava(), 1)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(name.split(".")[-2] for name in trained) == ["gate_proj", "up_proj"]
    for layer in model.model.language_model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(ValueError, match="no gate_proj"):
        GateUp().mark(model, 1)

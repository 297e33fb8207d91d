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
from reproductions.methods.lalora import LaLoRA, LaplaceSettings
from reproductions.methods.mask_the_target import MaskedSettings, MaskTheTarget
from reproductions.methods.model_dowser import ModelDowser, ProbeSettings, importance, least, least_important
from reproductions.methods.mofo import filter_by_momentum
from reproductions.methods.spider import weigh_by_importance
from tests.tiny_models import llava, llava_batch

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


class Chain(nn.Module):
    """f = V tanh(W x) of each token; its Jacobian is known."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(5, 4), nn.Linear(4, 3, bias=False), nn.LayerNorm(4)
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, x):
        return SimpleNamespace(logits=self.last(torch.tanh(self.first(x))))


def test_model_dowsers_score_is_sensitivity_times_weight_times_input():
    model, prompts = Chain(), [{"x": random(1, 6, 5, seed=seed)} for seed in range(3)]
    W, b, V = (p.detach() for p in (model.first.weight, model.first.bias, model.last.weight))
    drawn, probes = torch.Generator().manual_seed(7), 2
    first, last = torch.zeros(4, 5).double(), torch.zeros(3, 4).double()
    for prompt in prompts:
        x = prompt["x"][0]
        hidden = torch.tanh(x @ W.T + b)
        for _ in range(probes):
            xi = (torch.randint(0, 2, (1, 3), generator=drawn) * 2.0 - 1)[0].double()
            # Tokens do not see each other here, so that the last one's logits hang on one token of six.
            sensitivity = ((V.T @ xi) * (1 - hidden[-1] ** 2)).abs() / 6
            for i in range(4):
                for j in range(5):
                    first[i, j] += sensitivity[i] * W[i, j].abs() * x[:, j].abs().mean() / (3 * probes)
            for i in range(3):
                for j in range(4):
                    last[i, j] += xi[i].abs() / 6 * V[i, j].abs() * hidden[:, j].abs().mean() / (3 * probes)
    found = importance(model, [model.first, model.last, model.unused], prompts, probes, seed=7)
    for S, expected in zip(found, (first, last, torch.zeros(2, 2).double()), strict=True):
        torch.testing.assert_close(S, expected)
    parameters = [model.first.bias, model.first.weight, model.norm.weight]
    masks = least_important(model, parameters, prompts, 0.3, probes=probes, seed=7)
    assert [int(mask.sum()) for mask in masks] == [0, 6, 0], "what has no score stays"
    assert float(first[masks[1]].max()) < float(first[~masks[1]].min())
    assert least(torch.ones(2, 2), 0.5).tolist() == [[True, True], [False, False]]
    with pytest.raises(ValueError, match="prompts"):
        importance(model, [model.first], [])


def test_model_dowser_moves_a_share_of_each_weight_of_the_last_layers():
    batch, network = llava_batch(), llava()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    method = ModelDowser(ProbeSettings(ratio=0.25, prompts=2, probes=1))
    prompts = [{name: x[row : row + 1] for name, x in batch.items() if name != "labels"} for row in (0, 1)]
    asked = []
    model = method.prepare(
        SimpleNamespace(network=network, layers=1, prompt_batches=lambda n: asked.append(n) or iter(prompts))
    )
    assert asked == [2]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: int((p != before[name]).sum()) for name, p in model.named_parameters()}
    assert {name.split(".")[-2] for name, count in moved.items() if count} == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert all(count <= round(0.25 * before[name].numel()) for name, count in moved.items())
    assert 0.9 * method.trained(model) < sum(moved.values()) <= method.trained(model)


def test_spider_weighs_what_has_moved_by_old_and_new_importance():
    start, rate = random(6, 5), 0.1
    weight, still = nn.Parameter(start.clone()), nn.Parameter(torch.ones(4).double())
    optimizer = torch.optim.SGD([weight, still], lr=rate)
    weigh_by_importance(optimizer)

    def ranks(x):
        sizes = [abs(v) for v in x.flatten().tolist()]
        mean = sum(sizes) / len(sizes)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in sizes) / (len(sizes) - 1))
        return [1 / (1 + math.exp(-(s - mean) / deviation)) for s in sizes]

    theta, total, old = start.clone(), torch.zeros(6, 5).double(), ranks(start)
    for step in range(1, 4):
        g = random(6, 5, seed=step)
        weight.grad = g.clone()
        optimizer.step()
        total += g
        shares = [b / (a + b) if a < b else 0.0 for a, b in zip(old, ranks(total), strict=True)]
        mean = sum(shares) / sum(x > 0 for x in shares)
        M = torch.tensor([min(1.0, x / mean) for x in shares]).double().view(6, 5)
        theta = (1 - M) * start + M * (theta - rate * g)
        torch.testing.assert_close(weight.detach(), theta)
    assert bool((still == 1).all()), "without a gradient nothing moves"
    still.grad = torch.tensor([0.0, 0.0, 0.0, 5.0]).double()
    optimizer.step()
    assert still.tolist() == [1, 1, 1, 0.5], "all alike before: as important as the mean"


def test_lalora_is_the_curvature_of_samples_where_adapters_begin():
    """At B = 0 the gradient of B is s G Aᵀ, G that of the layer's own weight, and A has none."""
    batches = [llava_batch(seed, images=1) for seed in range(3)]
    plain = llava().double()
    work = SimpleNamespace(network=llava().double(), layers=1, memory_batches=lambda count: batches[:count])
    method = LaLoRA(LaplaceSettings(rank=2, weight=0.5, samples=3))
    module = method.prepare(work).double()
    penalty = method.penalty(work, module)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    own = dict(plain.named_parameters())
    own = {name: p for name, p in own.items() if not name.endswith("bias")}
    squares = [torch.zeros_like(p) for p in penalty.parameters]
    adapters = dict(module.named_parameters())
    for batch in batches:
        found = torch.autograd.grad(plain(**double(batch)).loss, list(own.values()), allow_unused=True)
        G = dict(zip(own, found, strict=True))
        for i, name in enumerate(names):
            layer = name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"
            if "lora_B" in name:
                A = adapters[name.replace("lora_B", "lora_A")].detach()
                squares[i] += (2 * G[layer] @ A.T) ** 2 / 3
    adapted = [i for i, name in enumerate(names) if "lora_" in name]
    scale = penalty.fisher[adapted[-1]].sum() / squares[adapted[-1]].sum()
    for i in adapted:
        torch.testing.assert_close(penalty.fisher[i].double(), scale * squares[i], rtol=1e-3, atol=1e-6)
    total = sum(f.double().sum() for f in penalty.fisher) / sum(f.numel() for f in penalty.fisher)
    assert float(total) == pytest.approx(1, rel=1e-5)
    with torch.no_grad():
        penalty.parameters[adapted[-1]] += 3
    assert float(penalty()) == pytest.approx(0.5 / 2 * 9 * float(penalty.fisher[adapted[-1]].sum()), rel=1e-5)


def double(batch):
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def test_mask_the_target_compares_all_but_the_right_token():
    batch = llava_batch()
    method = MaskTheTarget(MaskedSettings(rank=2, weight=3.0))
    module = method.prepare(SimpleNamespace(network=llava(), layers=1)).eval()
    with torch.no_grad():
        before = module(**batch).logits
    divergence = method.divergence(None, module)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    output = module(**batch)
    terms = []
    for row in range(2):
        for at in range(1, batch["labels"].shape[1]):
            right = int(batch["labels"][row, at])
            if right == IGNORED:
                continue
            both = [probabilities(logits[row, at - 1].detach()) for logits in (before, output.logits)]
            p, q = ([x / (1 - own[right]) for x in own] for own in both)
            terms.append(sum(p[y] * math.log(p[y] / q[y]) for y in range(len(p)) if y != right))
    loss = divergence(batch)(output)
    assert float(loss) == pytest.approx(3 * sum(terms) / len(terms), rel=1e-3)
    assert float(loss) > 0
    # Of the right token's own logit nothing is asked.
    logits = output.logits.detach().requires_grad_()
    divergence(batch)(SimpleNamespace(logits=logits)).backward()
    rows, places = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
    right = batch["labels"][rows, places + 1]
    assert float(logits.grad[rows, places, right].abs().max()) == 0
    assert float(logits.grad.abs().max()) > 0

"""Step space by the layers' inputs: their answers to image tokens stay, and only what was seen is protected."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.properties import assert_same_bits
from tests.reference.equations import protect_inputs
from tests.rules.protected import MASK, Model, batch, covariances, layers, normal, seen, train, wrap
from torch_mdgd import MDGDOptimizer, ProtectInputs, Random
from torch_mdgd.rules import inputs as inputs_module
from torch_mdgd.rules.inputs import top_eigenvectors

SEEDS = st.integers(0, 2**31)


def covariance(width, rank, seed):
    x = normal(3 * width, rank, seed=seed) @ normal(rank, width, seed=seed + 1)
    return x.T @ x / len(x)


@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.3, 0.9, 1.0]))
def test_a_decoupled_move_kills_every_direction_and_is_left_alone_afterwards(seed, width, rank, energy):
    (q,) = top_eigenvectors(covariance(width, rank, seed)[None], energy)
    assert torch.allclose(q.T @ q, torch.eye(q.shape[1], dtype=q.dtype), atol=1e-12)
    delta = protect_inputs(normal(4, width, seed=seed + 2), q)
    assert (delta @ q).abs().max() < 1e-12 * width
    assert torch.allclose(protect_inputs(delta, q), delta, rtol=1e-12, atol=1e-12)


@given(SEEDS, st.integers(1, 9), st.sampled_from([0.1, 0.5, 0.9]))
def test_the_basis_is_the_smallest_that_holds_the_energy(seed, width, energy):
    c = covariance(width, width, seed)
    (q,) = top_eigenvectors(c[None], energy)
    held = torch.trace(q.T @ c @ q) / torch.trace(c)
    largest_kept = torch.linalg.eigvalsh(c).flip(0)[: q.shape[1]]
    assert held >= energy * (1 - 1e-9)
    assert (largest_kept.sum() - largest_kept[-1]) / torch.trace(c) < energy * (1 + 1e-9)


def test_without_energy_or_without_inputs_nothing_is_kept():
    c = covariance(5, 5, 0)
    assert [q.shape for q in top_eigenvectors(torch.stack([c, 0 * c]), 0.0)] == [(5, 0), (5, 0)]
    assert [q.shape[1] for q in top_eigenvectors(torch.stack([c, 0 * c]), 1.0)] == [5, 0]


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_is_the_oracle_of_the_wrapped_optimizers_move(base):
    model = Model()
    twin, optimizer = copy.deepcopy(model), wrap(model, base=base)
    plain = base(twin.parameters(), lr=0.05)
    inputs = seen(model, [batch()])
    train(model, optimizer, [0])
    before = copy.deepcopy(twin)
    (twin(*batch()) - 1).square().mean().backward()
    plain.step()
    for name, layer in layers(model).items():
        x = inputs[name]
        (q,) = top_eigenvectors((x.T @ x)[None], 0.8)
        assert 0 < q.shape[1] < len(q)
        start, end = layers(before)[name], layers(twin)[name]
        move = torch.cat([end.weight - start.weight, (end.bias - start.bias)[:, None]], 1).detach()
        kept = torch.cat([layer.weight - start.weight, (layer.bias - start.bias)[:, None]], 1).detach()
        assert torch.allclose(kept, protect_inputs(move, q), rtol=1e-9, atol=1e-12)
        assert (move @ q).abs().max() > 1e-3 > 1e-12 > (kept @ q).abs().max()
    assert_same_bits([model.norm.weight, model.norm.bias], [twin.norm.weight, twin.norm.bias])


def test_the_covariance_by_hand_and_its_decay():
    model = Model()
    optimizer = wrap(model, decay=0.75, refresh=100)
    wanted = {name: 0.0 for name in layers(model)}
    for seed in range(3):
        x = seen(model, [batch(seed)])
        wanted = {name: 0.75 * c + 0.25 * x[name].T @ x[name] / len(x[name]) for name, c in wanted.items()}
        train(model, optimizer, [seed])
    names = optimizer.rule.names
    assert list(names.values()) == ["projector", "decoder.first", "decoder.second"]
    for i, c in optimizer.rule.covariances.items():
        assert torch.allclose(c, wanted[names[i].rpartition(".")[2]], rtol=1e-12)


def test_without_energy_it_is_the_wrapped_optimizer():
    model = Model()
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.05)
    for seed in range(3):
        (twin(*batch(seed)) - 1).square().mean().backward()
        plain.step()
        plain.zero_grad()
    train(model, wrap(model, energy=0.0), range(3))
    assert_same_bits(list(model.parameters()), list(twin.parameters()))


def test_a_pictures_answer_stays_while_the_words_answers_change():
    model = Model()
    x = batch()
    before = model.decoder.first(model.projector(x[0])).detach(), model(*x).detach()
    optimizer = wrap(model, energy=1 - 1e-12, refresh=1)
    train(model, optimizer, [0] * 5)
    assert torch.allclose(model.decoder.first(model.projector(x[0])), before[0], rtol=1e-4, atol=1e-6)
    assert (model(*x) - before[1])[:, 2:].abs().max() > 1e-2


def test_bases_are_the_same_decomposed_one_at_a_time(monkeypatch):
    found = []
    for size in (inputs_module.BATCH, 1):
        monkeypatch.setattr(inputs_module, "BATCH", size)
        model = Model(bias=False)
        model.decoder.second = nn.Linear(5, 3, bias=False).double()
        model.decoder.third = nn.Linear(5, 3, bias=False).double()
        optimizer = wrap(model)
        with optimizer.rule.observe(MASK):
            hidden = torch.tanh(model.decoder.first(normal(2, 5, 6)))
            model.decoder.second(hidden)
            model.decoder.third(hidden.clone() ** 3)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        found.append([q @ q.T for q in optimizer.rule.bases.values()])
    for x, y in zip(*found, strict=True):
        assert torch.allclose(x, y, atol=1e-10)
    assert sum(bool(x.any()) for x in found[0]) == 3


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:torch.distributed is disabled")
def test_distributed_checkpoint_loads_into_a_fresh_optimizer(tmp_path):
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, twin = Model(), Model()
    optimizer, loaded = wrap(model, refresh=3), wrap(twin, refresh=3)
    train(model, optimizer, range(4))
    save(get_optimizer_state_dict(model, optimizer), checkpoint_id=tmp_path / "saved", no_dist=True)
    state = get_optimizer_state_dict(twin, loaded)
    load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, loaded, state)
    train(model, optimizer, range(4, 8))
    train(twin, loaded, range(4, 8))
    assert_same_bits(list(model.parameters()), list(twin.parameters()))


def biases_alone():
    """Nothing of a frozen weight is saved."""
    model = Model()
    for p in model.parameters():
        p.requires_grad_(p.dim() == 1)
    return model


def test_a_weight_that_is_frozen_stays_and_is_protected_once_it_is_trained():
    model = biases_alone()
    optimizer = wrap(model)
    layer = model.decoder.first

    def move():
        before = [p.detach().clone() for p in (layer.weight, layer.bias)]
        train(model, optimizer, range(1))
        return [p.detach() - x for p, x in zip((layer.weight, layer.bias), before, strict=True)]

    weight, bias = move()
    assert not weight.any()
    assert bias.any()
    layer.weight.requires_grad_(True)
    weight, bias = move()
    (q,) = (q for i, q in optimizer.rule.bases.items() if optimizer.rule.names[i] == "decoder.first")
    both = torch.cat([weight, bias[:, None]], dim=1)
    assert weight.any()
    assert (both @ q).norm() <= 1e-12 * both.norm()


@pytest.mark.parametrize(("at", "make"), [(2, Model), (3, Model), (5, Model), (5, biases_alone)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(at, make):
    through, interrupted = make(), make()
    one, two = wrap(through, refresh=3), wrap(interrupted, refresh=3)
    train(through, one, range(8))
    train(interrupted, two, range(at))
    saved = copy.deepcopy((interrupted.state_dict(), two.state_dict()))
    resumed = make()
    optimizer = wrap(resumed, refresh=3)
    fresh = optimizer.state_dict()["state"]
    for i, entry in saved[1]["state"].items():
        assert {k: x.shape for k, x in fresh[i].items()}.items() <= {k: x.shape for k, x in entry.items()}.items()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, optimizer, range(at, 8))
    assert_same_bits(list(through.parameters()), list(resumed.parameters()))


def test_a_state_dict_of_other_layers_is_refused_and_one_without_forgets():
    model, other = Model(), Model(bias=False)
    optimizer = wrap(model)
    train(model, optimizer, [0])
    saved = optimizer.state_dict()
    for i, entry in saved["state"].items():
        if i == 4:
            entry["mdgd_covariance"] = torch.zeros(6, 6)
    with pytest.raises(ValueError, match="covariance"):
        optimizer.load_state_dict(saved)
    assert covariances(optimizer)[1].any()
    plain = torch.optim.AdamW(model.parameters(), lr=0.05)
    with pytest.warns(UserWarning, match="no reference"):
        optimizer.load_state_dict(plain.state_dict())
    assert not any(c.any() for c in covariances(optimizer))
    assert not any(q.shape[1] for q in optimizer.rule.bases.values())
    assert [len(c) for c in covariances(wrap(other))] == [5, 6, 5]


def test_what_it_cannot_protect_is_refused():
    model = Model()

    def base():
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def rule(**options):
        return ProtectInputs(model, text_module=model.decoder, **options)

    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        MDGDOptimizer(torch.optim.SGD(model.norm.parameters(), lr=0.1), rule())
    own = rule()
    MDGDOptimizer(base(), own)
    with pytest.raises(ValueError, match="another optimizer"):
        MDGDOptimizer(base(), own)
    with pytest.raises(ValueError, match="outside a mask"):
        MDGDOptimizer(base(), rule(), mask=Random(0.3))
    wrong = [{"energy": x} for x in (1.1, -0.1, 2, "0.9", True)] + [{"decay": x} for x in (1.0, None)]
    for bad in (*wrong, {"refresh": 0}, {"refresh": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            rule(**bad)
    with pytest.raises(ValueError, match="parts holds a layer that is no part"):
        rule(parts=[model.projector, nn.Linear(4, 6)])
    with pytest.raises(TypeError, match="not a model of transformers"):
        ProtectInputs(model)


def test_parts_alone_are_protected():
    models = Model(), Model()
    # As connector() returns several modules: in a list that the model does not hold.
    parts = nn.ModuleList([models[1].projector, models[1].decoder.second])
    optimizers = wrap(models[0]), wrap(models[1], parts=[parts])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, [0])
    assert set(optimizers[1].rule.names.values()) == {"projector", "decoder.second"}
    plain = Model()
    free = wrap(plain, energy=0)
    train(plain, free, [0])
    for name in ("projector", "second"):
        assert_same_bits([layers(models[1])[name].weight], [layers(models[0])[name].weight])
    assert_same_bits([models[1].decoder.first.weight], [plain.decoder.first.weight])
    assert not torch.equal(models[0].decoder.first.weight, plain.decoder.first.weight)

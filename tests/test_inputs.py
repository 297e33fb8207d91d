"""Step space by the layers' inputs: their answers to image tokens stay, and only what was seen is protected."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer, VisualInputs
from torch_mdgd import inputs as inputs_module
from torch_mdgd.inputs import decouple_weight, top_eigenvectors

SEEDS = st.integers(0, 2**31)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(width, rank, seed):
    x = normal(3 * width, rank, seed=seed) @ normal(rank, width, seed=seed + 1)
    return x.T @ x / len(x)


@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.3, 0.9, 1.0]))
def test_a_decoupled_move_kills_every_direction_and_is_left_alone_afterwards(seed, width, rank, energy):
    (q,) = top_eigenvectors(covariance(width, rank, seed)[None], energy)
    assert torch.allclose(q.T @ q, torch.eye(q.shape[1], dtype=q.dtype), atol=1e-12)
    delta = decouple_weight(normal(4, width, seed=seed + 2), q)
    assert (delta @ q).abs().max() < 1e-12 * width
    assert torch.allclose(decouple_weight(delta, q), delta, rtol=1e-12, atol=1e-12)


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


class Decoder(nn.Module):
    def __init__(self, bias=True, recompute=False):
        super().__init__()
        self.first = nn.Linear(6, 5, bias=bias)
        self.second = nn.Linear(5, 3, bias=bias)
        self.recompute = recompute

    def forward(self, x):
        hidden = checkpoint(self.first, x, use_reentrant=False) if self.recompute else self.first(x)
        return self.second(torch.tanh(hidden))


class Model(nn.Module):
    """A projector that sees pictures alone, a decoder that sees them among words, and a norm."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.projector = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.decoder = Decoder(**options)
        self.double()

    def forward(self, pictures, words):
        sequence = torch.cat([self.projector(pictures), self.norm(words)], dim=1)
        return self.decoder(sequence)


MASK = torch.tensor([[True, True, False, False, False]]).expand(2, 5)


def batch(seed=0):
    # Pictures of little energy beyond one direction, so that there is something left to learn with.
    pictures = normal(2, 2, 1, seed=seed) * torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    return pictures + 0.1 * normal(2, 2, 4, seed=seed + 7), normal(2, 3, 6, seed=seed + 1)


def wrap(model, energy=0.8, base=torch.optim.AdamW, **options):
    inputs = VisualInputs(model, energy, text_module=model.decoder, **options)
    return MDGDOptimizer(base(model.parameters(), lr=0.05), update="project", space="step", protect=inputs)


def train(model, optimizer, seeds, mask=MASK):
    for seed in seeds:
        with optimizer.inputs.observe(mask):
            loss = (model(*batch(seed)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def layers(model):
    return {"projector": model.projector, "first": model.decoder.first, "second": model.decoder.second}


def seen(model, batches):
    """By hand: what enters each layer at image tokens, with the 1 of its bias."""
    pictures, words = (torch.cat(x) for x in zip(*batches, strict=True))
    sequence = torch.cat([model.projector(pictures), model.norm(words)], 1)[:, :2]
    found = {"projector": pictures, "first": sequence, "second": torch.tanh(model.decoder.first(sequence))}
    ones = torch.ones(len(pictures) * 2, 1, dtype=torch.float64)
    return {name: torch.cat([x.detach().reshape(-1, x.shape[-1]), ones], 1) for name, x in found.items()}


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
        assert torch.allclose(kept, decouple_weight(move, q), rtol=1e-9, atol=1e-12)
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
    names = optimizer.inputs.names
    assert list(names.values()) == ["projector", "decoder.first", "decoder.second"]
    for i, c in optimizer.inputs.covariances.items():
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


def covariances(optimizer):
    return list(optimizer.inputs.covariances.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_run_again_in_the_backward_pass_counts_once(recompute):
    model = Model(recompute=recompute)
    wanted = seen(model, [batch()])["first"]
    optimizer = wrap(model, decay=0.0, refresh=1)
    with optimizer.inputs.observe(MASK):
        (model(*batch()) - 1).square().mean().backward()
        assert float(optimizer.inputs._counts[4]) == 4
    optimizer.step()
    assert torch.allclose(optimizer.inputs.covariances[4], wanted.T @ wanted / 4, rtol=1e-12)


def test_a_step_without_image_tokens_leaves_the_covariances_alone_and_is_protected():
    model = Model()
    optimizer = wrap(model)
    train(model, optimizer, [0])
    before = [c.clone() for c in covariances(optimizer)][1:]
    weight, q = model.decoder.first.weight.detach().clone(), optimizer.inputs.bases[4]
    bias = model.decoder.first.bias.detach().clone()
    train(model, optimizer, [1], mask=torch.zeros_like(MASK))
    assert_same_bits(covariances(optimizer)[1:], before)
    move = torch.cat([model.decoder.first.weight - weight, (model.decoder.first.bias - bias)[:, None]], 1)
    assert move.abs().max() > 1e-3
    assert (move @ q).abs().max() < 1e-12


def test_micro_batches_add_up():
    first, second = Model(), Model()
    one, two = wrap(first), wrap(second)
    parts = [batch(0), batch(1)]
    whole = [torch.cat(x) for x in zip(*parts, strict=True)]
    with one.inputs.observe(MASK.repeat(2, 1)):
        (first(*whole) - 1).square().mean().backward()
    for part in parts:
        with two.inputs.observe(MASK):
            ((second(*part) - 1).square().mean() / 2).backward()
    one.step()
    two.step()
    for x, y in zip(covariances(one), covariances(two), strict=True):
        assert torch.allclose(x, y, rtol=1e-12)


def test_an_exception_inside_forgets_the_step():
    model = Model()
    optimizer = wrap(model)

    def interrupted():
        with optimizer.inputs.observe(MASK):
            model(*batch())
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert not optimizer.inputs._sums
    assert not any(m._forward_pre_hooks for m in model.modules())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not any(c.any() for c in covariances(optimizer))


def test_pictures_that_no_layer_saw_are_an_error():
    optimizer = wrap(Model())
    with pytest.raises(RuntimeError, match="no protected layer was run"), optimizer.inputs.observe(MASK):
        pass
    with optimizer.inputs.observe(torch.zeros_like(MASK)):
        pass


def test_a_layer_may_be_given_its_input_by_name():
    model, pictures = Model(), batch()[0]
    optimizers = [wrap(model), wrap(model)]
    with optimizers[0].inputs.observe(MASK):
        model.projector(pictures)
    with optimizers[1].inputs.observe(MASK):
        model.projector(input=pictures)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert_same_bits(covariances(optimizers[0]), covariances(optimizers[1]))
    assert any(c.any() for c in covariances(optimizers[0]))


class Shared(nn.Module):
    """Two layers that see one tensor, of which the first has no bias; the tensor may change between them."""

    def __init__(self, change=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)
        self.change = change
        self.double()

    def forward(self, x):
        self.first(x)
        if self.change:
            x.add_(self.change)
        self.second(x)


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_layers_that_share_a_tensor_each_see_what_it_holds_then_and_their_bias(change):
    model, x = Shared(change), normal(2, 5, 4)
    inputs = VisualInputs(model, text_module=model)
    optimizer = MDGDOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), update="project", space="step", protect=inputs
    )
    seen = x[MASK].clone()
    with torch.no_grad(), inputs.observe(MASK):
        model(x)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    then = torch.cat([seen + change, torch.ones(len(seen), 1, dtype=seen.dtype)], 1)
    for c, entered in zip(covariances(optimizer), (seen, then), strict=True):
        assert torch.allclose(c, 0.05 * entered.T @ entered / len(seen), rtol=1e-12)


def test_a_first_step_without_pictures_does_not_put_off_the_first_basis():
    model = Model()
    inputs = VisualInputs(model, text_module=model.decoder, parts=[model.decoder], refresh=50)
    optimizer = MDGDOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), update="project", space="step", protect=inputs
    )
    train(model, optimizer, [0], mask=torch.zeros_like(MASK))
    assert not any(q.shape[1] for q in inputs.bases.values())
    train(model, optimizer, [1])
    assert all(q.shape[1] for q in inputs.bases.values())


def test_bases_are_the_same_decomposed_one_at_a_time(monkeypatch):
    found = []
    for size in (inputs_module.BATCH, 1):
        monkeypatch.setattr(inputs_module, "BATCH", size)
        model = Model(bias=False)
        model.decoder.second = nn.Linear(5, 3, bias=False).double()
        model.decoder.third = nn.Linear(5, 3, bias=False).double()
        optimizer = wrap(model)
        with optimizer.inputs.observe(MASK):
            hidden = torch.tanh(model.decoder.first(normal(2, 5, 6)))
            model.decoder.second(hidden)
            model.decoder.third(hidden.clone() ** 3)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        found.append([q @ q.T for q in optimizer.inputs.bases.values()])
    for x, y in zip(*found, strict=True):
        assert torch.allclose(x, y, atol=1e-10)
    assert sum(bool(x.any()) for x in found[0]) == 3


def test_what_was_seen_before_loading_is_forgotten():
    model = Model()
    optimizer = wrap(model)
    train(model, optimizer, [0])
    saved, before = copy.deepcopy(optimizer.state_dict()), [c.clone() for c in covariances(optimizer)]
    with optimizer.inputs.observe(MASK):
        model(*batch(3))
    optimizer.load_state_dict(saved)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits(covariances(optimizer), before)


def test_inputs_that_hold_nan_at_image_tokens_are_not_followed_and_others_may():
    model = Model()
    optimizer = wrap(model)
    train(model, optimizer, [0])
    before = [c.clone() for c in covariances(optimizer)]
    pictures, words = batch()
    with optimizer.inputs.observe(MASK):
        model(torch.full_like(pictures, float("inf")), words)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits(covariances(optimizer), before)
    with optimizer.inputs.observe(MASK):
        model(pictures, torch.full_like(words, float("nan")))
    optimizer.step()
    assert all(c.isfinite().all() for c in covariances(optimizer))
    assert not torch.equal(covariances(optimizer)[1], before[1])


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


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(at):
    through, interrupted = Model(), Model()
    one, two = wrap(through, refresh=3), wrap(interrupted, refresh=3)
    train(through, one, range(8))
    train(interrupted, two, range(at))
    saved = copy.deepcopy((interrupted.state_dict(), two.state_dict()))
    resumed = Model()
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
    assert not any(q.shape[1] for q in optimizer.inputs.bases.values())
    assert [len(c) for c in covariances(wrap(other))] == [5, 6, 5]


def test_what_it_cannot_protect_is_refused():
    model = Model()

    def base():
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def inputs(**options):
        return VisualInputs(model, text_module=model.decoder, **options)

    step = {"update": "project", "space": "step"}
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        MDGDOptimizer(torch.optim.SGD(model.norm.parameters(), lr=0.1), protect=inputs(), **step)
    own = inputs()
    MDGDOptimizer(base(), protect=own, **step)
    with pytest.raises(ValueError, match="another optimizer"):
        MDGDOptimizer(base(), protect=own, **step)
    wrong = [{"energy": x} for x in (1.1, -0.1, 2, "0.9", True)] + [{"decay": x} for x in (1.0, None)]
    for bad in (*wrong, {"refresh": 0}, {"refresh": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            inputs(**bad)
    with pytest.raises(ValueError, match="parts holds a module that is no part"):
        inputs(parts=[model.projector, nn.Linear(4, 6)])
    with pytest.raises(TypeError, match="not a model of transformers"):
        VisualInputs(model)


def test_parts_alone_are_protected():
    models = Model(), Model()
    optimizers = wrap(models[0]), wrap(models[1], parts=[models[1].projector, models[1].decoder.second])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, [0])
    assert set(optimizers[1].inputs.names.values()) == {"projector", "decoder.second"}
    plain = Model()
    free = wrap(plain, energy=0)
    train(plain, free, [0])
    for name in ("projector", "second"):
        assert_same_bits([layers(models[1])[name].weight], [layers(models[0])[name].weight])
    assert_same_bits([models[1].decoder.first.weight], [plain.decoder.first.weight])
    assert not torch.equal(models[0].decoder.first.weight, plain.decoder.first.weight)


def test_a_sequence_other_than_the_masks_is_refused():
    model = Model()
    optimizer = wrap(model)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\), the input of decoder\.first"):
        train(model, optimizer, [0], mask=MASK[:, :4])

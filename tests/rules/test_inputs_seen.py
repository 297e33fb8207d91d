"""Which inputs of layers are counted: once, at image tokens, as they were, in the step that saw them."""

import copy

import pytest
import torch
from torch import nn

from tests.properties import assert_same_bits
from tests.rules.protected import MASK, Model, batch, covariances, normal, seen, train, wrap
from torch_mdgd import MDGDOptimizer, ProtectInputs


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_run_again_in_the_backward_pass_counts_once(recompute):
    model = Model(recompute=recompute)
    wanted = seen(model, [batch()])["first"]
    optimizer = wrap(model, decay=0.0, refresh=1)
    with optimizer.rule.observe(MASK):
        (model(*batch()) - 1).square().mean().backward()
        assert float(optimizer.rule._counts[4]) == 4
    optimizer.step()
    assert torch.allclose(optimizer.rule.covariances[4], wanted.T @ wanted / 4, rtol=1e-12)


def test_a_step_without_image_tokens_leaves_the_covariances_alone_and_is_protected():
    model = Model()
    optimizer = wrap(model)
    train(model, optimizer, [0])
    before = [c.clone() for c in covariances(optimizer)][1:]
    weight, q = model.decoder.first.weight.detach().clone(), optimizer.rule.bases[4]
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
    with one.rule.observe(MASK.repeat(2, 1)):
        (first(*whole) - 1).square().mean().backward()
    for part in parts:
        with two.rule.observe(MASK):
            ((second(*part) - 1).square().mean() / 2).backward()
    one.step()
    two.step()
    for x, y in zip(covariances(one), covariances(two), strict=True):
        assert torch.allclose(x, y, rtol=1e-12)


def test_an_exception_inside_forgets_the_step():
    model = Model()
    optimizer = wrap(model)

    def interrupted():
        with optimizer.rule.observe(MASK):
            model(*batch())
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert not optimizer.rule._sums
    assert not any(m._forward_pre_hooks for m in model.modules())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not any(c.any() for c in covariances(optimizer))


def test_pictures_that_no_layer_saw_are_an_error():
    optimizer = wrap(Model())
    with pytest.raises(RuntimeError, match="no protected layer was run"), optimizer.rule.observe(MASK):
        pass
    with optimizer.rule.observe(torch.zeros_like(MASK)):
        pass


def test_a_layer_may_be_given_its_input_by_name():
    model, pictures = Model(), batch()[0]
    optimizers = [wrap(model), wrap(model)]
    with optimizers[0].rule.observe(MASK):
        model.projector(pictures)
    with optimizers[1].rule.observe(MASK):
        model.projector(input=pictures)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert_same_bits(covariances(optimizers[0]), covariances(optimizers[1]))
    assert any(c.any() for c in covariances(optimizers[0]))


class Shared(nn.Module):
    """Two layers that see one tensor: the first has no bias, or the tensor changes between them."""

    def __init__(self, change=0.0):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3, bias=bool(change)), nn.Linear(4, 3)
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
    rule = ProtectInputs(model, text_module=model)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule)
    held = x[MASK].clone()
    with torch.no_grad(), rule.observe(MASK):
        model(x)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    ones = torch.ones(len(held), 1, dtype=held.dtype)
    first, then = torch.cat([held, ones], 1) if change else held, torch.cat([held + change, ones], 1)
    for c, entered in zip(covariances(optimizer), (first, then), strict=True):
        assert torch.allclose(c, 0.05 * entered.T @ entered / len(held), rtol=1e-12)


def test_a_first_step_without_pictures_does_not_put_off_the_first_basis():
    model = Model()
    rule = ProtectInputs(model, text_module=model.decoder, parts=[model.decoder], refresh=50)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule)
    train(model, optimizer, [0], mask=torch.zeros_like(MASK))
    assert not any(q.shape[1] for q in rule.bases.values())
    train(model, optimizer, [1])
    assert all(q.shape[1] for q in rule.bases.values())


def test_what_was_seen_before_loading_is_forgotten():
    model = Model()
    optimizer = wrap(model)
    train(model, optimizer, [0])
    saved, before = copy.deepcopy(optimizer.state_dict()), [c.clone() for c in covariances(optimizer)]
    with optimizer.rule.observe(MASK):
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
    with optimizer.rule.observe(MASK):
        model(torch.full_like(pictures, float("inf")), words)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits(covariances(optimizer), before)
    with optimizer.rule.observe(MASK):
        model(pictures, torch.full_like(words, float("nan")))
    optimizer.step()
    assert all(c.isfinite().all() for c in covariances(optimizer))
    assert not torch.equal(covariances(optimizer)[1], before[1])


def test_a_sequence_other_than_the_masks_is_refused():
    model = Model()
    optimizer = wrap(model)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\), the input of decoder\.first"):
        train(model, optimizer, [0], mask=MASK[:, :4])

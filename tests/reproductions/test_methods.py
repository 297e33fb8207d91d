"""The methods that MDGD is compared with, against slow forms, known answers and the paper's counts."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, LlavaConfig

from reproductions.methods import (
    METHODS,
    ElasticWeights,
    PullTowards,
    Replay,
    diagonal_fisher,
    lora,
    tailor_,
    train_last,
)
from reproductions.methods.model_tailor import tailored
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGDOptimizer, connector, freeze_all_but, last_decoder_layers, mdgd_backward

GRADIENTS = {
    "mdgd": 4, "mdgd-no-align": 4, "mdgd-gm": 2, "fine-tune-lv": 2, "project": 2, "step": 2, "inputs": 1,
    "lazy": 1, "anchor": 1, "lora-all-lv": 2, "lora-all-anchor": 1,
}  # fmt: skip
"""How many a step needs, of the methods that have a rule."""


def surgery(W, before, X, fraction, omega, sign, block):
    """Model Tailor for one weight, number by number in float64, from the samples themselves."""
    W, (outputs, inputs), n = W.clone(), W.shape, len(X)
    change = (W - before).abs()
    H = 2 / n * sum(torch.outer(x, x) for x in X)
    for i in range(inputs):
        if H[i, i] == 0:
            H[i, i] = 1
    H += 0.01 * H.diagonal().mean() * torch.eye(inputs, dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(H)).T
    kept = torch.zeros(outputs, inputs, dtype=torch.bool)
    for start in range(0, inputs, block):
        columns = range(start, min(start + block, inputs))
        scores = {}
        for row in range(outputs):
            moved = torch.stack([change[row, j] for j in columns])
            matters = torch.stack([W[row, j] ** 2 / U[j, j] ** 2 for j in columns])
            for j, a, b in zip(
                columns, (moved - moved.mean()) / moved.std(), (matters - matters.mean()) / matters.std(), strict=True
            ):
                scores[row, j] = float(omega * a + (1 - omega) * b)
        best = sorted(scores, key=scores.__getitem__, reverse=True)
        for place in best[: max(1, round(fraction * len(best)))]:
            kept[place] = True
        for j in columns:
            for row in range(outputs):
                if not kept[row, j]:
                    error = (W[row, j] - before[row, j]) / U[j, j]
                    W[row, j] = before[row, j]
                    for later in range(j + 1, inputs):
                        W[row, later] += sign * error * U[j, later]
    return W, kept


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000), omega=st.sampled_from([0.0, 0.5, 0.8, 1.0]), sign=st.sampled_from([-1.0, 1.0]),
    inputs=st.integers(3, 10), block=st.integers(3, 12), fraction=st.sampled_from([0.1, 0.4, 1.0]),
)  # fmt: skip
def test_a_tailored_weight_equals_the_slow_form(seed, omega, sign, inputs, block, fraction):
    assume(inputs % block not in (1, 2))  # rows of one or two columns all have the same standardised scores
    generator = torch.Generator().manual_seed(seed)
    W, before, X = (torch.randn(rows, inputs, generator=generator, dtype=torch.float64) for rows in (3, 3, 20))
    X[:, 0] = 0  # an input that never fires
    expected, kept = surgery(W, before, X, fraction, omega, sign, block)
    got, mask = tailored(W, before, 2 / len(X) * X.T @ X, fraction, omega, sign, block)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_compensation_brings_outputs_nearer_to_the_fine_tuned_ones():
    torch.manual_seed(0)
    X = torch.randn(500, 4, dtype=torch.float64) @ torch.randn(4, 16, dtype=torch.float64)
    X += 0.1 * torch.randn(500, 16, dtype=torch.float64)
    W, before = torch.randn(8, 16, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64)
    compensated, mask = tailored(W, before, 2 / 500 * X.T @ X, 0.3, 1.0, -1.0, 16)
    error, plain = ((X @ (V - W).T).square().mean() for V in (compensated, torch.where(mask, W, before)))
    assert error < 0.9 * plain


def finetuned(layers=1):
    """A tiny LLaVA with noise on its last layers and its connector, and what it was before."""
    model = llava()
    names = {id(p): name for name, p in model.named_parameters()}
    trained = freeze_all_but(model, [*last_decoder_layers(model, layers), connector(model)])
    before = {names[id(p)]: p.detach().clone() for p in trained}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained:
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model, before


def test_a_tenth_is_kept_the_connector_goes_back_and_norms_stay():
    model, before = finetuned()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = tailor_(model, before, [llava_batch(seed) for seed in range(4)], samples=7)
    assert len(masks) == 7, "q, k, v, o, gate, up and down"
    for name, p in model.named_parameters():
        if name in masks:
            assert int(masks[name].sum()) == round(0.1 * p.numel())
            assert torch.equal(p[~masks[name]], before[name][~masks[name]])
            assert not torch.equal(p, before[name])
        else:
            assert torch.equal(p, before[name] if "projector" in name else after[name])


@pytest.mark.parametrize("choice", ["revert", "keep", "tailor"])
def test_the_connector_goes_back_stays_or_is_tailored(choice):
    model, before = finetuned()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = tailor_(model, before, [llava_batch()], connector=choice)
    for name, p in connector(model).named_parameters(prefix="model.multi_modal_projector"):
        if choice == "tailor" and name.endswith("weight"):
            assert torch.equal(p[~masks[name]], before[name][~masks[name]])
            assert not torch.equal(p, before[name])
        else:
            assert torch.equal(p, (before if choice == "revert" else after)[name])


@pytest.mark.parametrize("choice", ["revert", "tailor"])
def test_every_layer_is_tailored_on_the_inputs_that_it_gets_in_the_end(choice):
    model, before = finetuned(layers=2)
    last = list(last_decoder_layers(model, 1)[0].parameters())
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch, seen = llava_batch(), []
    tailor_(model, before, [batch], connector=choice)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        # Everything before the last layer as it came out, the last layer as it was fine-tuned.
        for name, p in model.named_parameters():
            if any(p is x for x in last):
                p.copy_(after[name])
    down = last_decoder_layers(model, 1)[0].mlp.down_proj
    down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][batch["attention_mask"].bool()]))
    model(**batch)
    name = next(name for name, p in model.named_parameters() if p is down.weight)
    X = seen[0].detach()
    expected, _ = tailored(down.weight.detach(), before[name], 2 / len(batch["labels"]) * X.T @ X, 0.1, 0.5, -1.0, 128)
    torch.testing.assert_close(wanted[name], expected)


def test_samples_beyond_the_number_asked_for_and_padding_do_not_count():
    def run(batches, samples):
        model, before = finetuned()
        tailor_(model, before, batches, samples=samples)
        return [p.detach().clone() for p in model.parameters()]

    first, other = llava_batch(0), llava_batch(1)
    padded = {name: x.clone() for name, x in first.items()}
    padded["input_ids"][0, 0] = 5  # the masked place
    wanted = run([first], 2)
    assert all(torch.equal(a, b) for a, b in zip(wanted, run([first, other], 2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(wanted, run([padded], 2), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(wanted, run([first, other], 4), strict=True))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"fraction": 0.0}, "fraction"),
        ({"omega": 1.1}, "omega"),
        ({"sign": "minus"}, "sign"),
        ({"connector": "both"}, "connector"),
        ({"batches": []}, "batches"),
    ],
)
def test_bad_arguments_of_tailor_are_named(change, word):
    model, before = finetuned()
    arguments = {"batches": [llava_batch()], **change}
    with pytest.raises(ValueError, match=word):
        tailor_(model, before, arguments.pop("batches"), **arguments)


def test_a_model_that_was_not_trained_cannot_be_tailored():
    model = llava()
    with pytest.raises(ValueError, match="differs"):
        tailor_(model, dict(model.named_parameters()), [llava_batch()])


def test_the_pull_is_half_the_weighted_squared_distance():
    p, q = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([[3.0]]))
    pull = PullTowards([p, q], weight=4.0)
    assert pull().item() == 0
    with torch.no_grad():
        p += torch.tensor([1.0, -2.0])
        q -= 3
    penalty = pull()
    assert penalty.item() == pytest.approx(4 / 2 * (1 + 4 + 9))
    penalty.backward()
    torch.testing.assert_close(p.grad, torch.tensor([4.0, -8.0]))


def test_elastic_weights_hold_each_number_by_its_information():
    p = torch.nn.Parameter(torch.zeros(2))
    penalty = ElasticWeights([p], [torch.tensor([3.0, 0.0])], weight=2.0)
    with torch.no_grad():
        p += 5
    assert penalty().item() == pytest.approx(2 / 2 * 3 * 25)
    with pytest.raises(ValueError, match="fisher"):
        ElasticWeights([p], [torch.ones(3)], weight=1.0)
    with pytest.raises(ValueError, match="weight"):
        ElasticWeights([p], [torch.ones(2)], weight=-1.0)


def test_the_fisher_diagonal_is_the_mean_squared_gradient():
    w, unused = torch.nn.Parameter(torch.tensor([2.0, 1.0])), torch.nn.Parameter(torch.ones(1))
    fisher = diagonal_fisher([w, unused], [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])], lambda x: (w * x).sum())
    torch.testing.assert_close(fisher, [torch.tensor([(1 + 9) / 2, (4 + 0) / 2]), torch.zeros(1)])
    assert w.grad is None
    with pytest.raises(ValueError, match="batches"):
        diagonal_fisher([w], [], lambda x: (w * x).sum())


def test_lora_has_the_papers_number_of_parameters():
    config = LlavaConfig(image_token_index=32000)
    config.text_config.vocab_size = 32064
    with torch.device("meta"):
        model = lora(AutoModelForImageTextToText.from_config(config))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 29_368_320


def test_lora_trains_the_language_model_and_the_connector_alone_and_merges():
    model, batch = llava().eval(), llava_batch()
    wanted = model(**batch).logits
    adapted = lora(model, rank=2)
    torch.testing.assert_close(adapted(**batch).logits, wanted)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert not [name for name in trained if "vision_tower" in name]
    assert sum("projector" in name for name in trained) == len(list(connector(llava()).parameters()))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p += 0.05
    wanted = adapted(**batch).logits
    merged = adapted.merge_and_unload()
    assert type(merged) is type(llava())
    torch.testing.assert_close(merged(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="rank"):
        lora(llava(), rank=0)


def test_replay_replaces_a_share_by_different_old_examples():
    replay = Replay(range(100, 110), share=0.5)
    mixed = replay(range(8), np.random.default_rng(0))
    assert mixed[:4] == [0, 1, 2, 3]
    assert len(set(mixed[4:])) == 4
    assert set(mixed[4:]) <= set(range(100, 110))
    assert mixed != replay(range(8), np.random.default_rng(1))
    with pytest.raises(ValueError, match="share"):
        Replay([1], share=2)
    with pytest.raises(ValueError, match="memory"):
        Replay([])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_how_its_steps_are_made(name):
    model, batch = llava(), llava_batch()
    method, parameters = METHODS[name](), train_last(model, 1)
    wrapper = method.wrapper(model)
    assert (wrapper is not None) == (name in GRADIENTS)
    assert len(method.needs(model)) == GRADIENTS.get(name, 1)
    if wrapper is None:
        return
    assert method.rule(model) is not method.rule(model), "one with a state of its own belongs to one optimizer"
    optimizer = MDGDOptimizer(torch.optim.AdamW(parameters, lr=1e-2), **wrapper)
    before = [p.detach().clone() for p in parameters]
    for _ in range(2):
        mdgd_backward(model, optimizer, batch)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.needs() == method.needs(model), "after a mask was chosen, if there is one"
    moved = sum(int((p != x).sum()) for p, x in zip(parameters, before, strict=True))
    assert 0 < moved <= method.trained(model)


def test_mdgd_gm_makes_the_same_update_compact_and_not():
    found = []
    for compact in (True, False):
        model, batch = llava(), llava_batch()
        method = METHODS["mdgd-gm"](METHODS["mdgd-gm"].Settings(compact=compact))
        optimizer = MDGDOptimizer(torch.optim.AdamW(train_last(model, 1), lr=1e-2), **method.wrapper(model))
        assert method.compact == compact
        for _ in range(3):
            mdgd_backward(model, optimizer, batch)
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)

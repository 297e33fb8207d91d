"""Which rows of a layer's input are tokens is asked of the module tree, and what is not covered is told."""

import warnings

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.families import LLAMA
from tests.tiny_models import IMAGE, llava, llava_batch
from torch_mdgd import MDGDOptimizer, ProtectInputs, mdgd_backward
from torch_mdgd.models.linear import Linear, is_routed, prompt_tokens, rows, trained_linear_layers


def protected(model, **settings):
    rule = ProtectInputs(model, **settings)
    return MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule)


def counts(optimizer):
    """How many rows of each layer were counted in the step under way."""
    rule = optimizer.rule
    return {rule.names[i]: int(n) for i, n in rule._counts.items()}


def test_a_towers_patches_are_not_masked_since_the_text_has_as_many_tokens():
    model, batch = llava(), llava_batch()
    # A class token and four patches in the tower; five tokens in the text.
    batch = {key: x[:, 1:6] if x.dim() == 2 else x for key, x in batch.items()}
    assert int((batch["input_ids"] == IMAGE).sum()) == 8
    optimizer = protected(model)
    with optimizer.rule.observe(batch["input_ids"] == IMAGE, batch):
        model(**batch)
        found = counts(optimizer)
    assert {n for name, n in found.items() if "vision_tower.encoder" in name} == {10}
    assert {n for name, n in found.items() if "language_model" in name} == {8}
    assert found["model.multi_modal_projector.linear_1"] == 8


@pytest.mark.parametrize("keep", [0, 5, torch.tensor([1, 2, 6])])
def test_the_head_is_masked_at_the_tokens_that_it_sees(keep):
    model = llava()
    batch = {key: x for key, x in llava_batch().items() if key != "labels"} | {"logits_to_keep": keep}
    optimizer = protected(model)
    images = batch["input_ids"] == IMAGE
    with optimizer.rule.observe(images, batch):
        model(**batch)
        found = counts(optimizer)
    wanted = images[:, slice(-keep, None) if isinstance(keep, int) else keep]
    assert found["lm_head"] == int(wanted.sum())


def test_labels_of_kept_tokens_alone_say_the_same():
    ids, labels = torch.ones(2, 7, dtype=torch.int64), torch.full((2, 7), -100)
    labels[0, 4:], labels[1, 5] = 1, 1
    wanted = labels == -100
    assert torch.equal(prompt_tokens({"input_ids": ids, "labels": labels}), wanted)
    # As ms-swift cuts them: the last so many, or for one sample those at which an answer is predicted, and the last.
    cut = {"input_ids": ids, "labels": labels[:, -4:], "logits_to_keep": 4}
    assert torch.equal(prompt_tokens(cut), wanted)
    one = {"input_ids": ids[1:], "labels": torch.tensor([[-100, 1]])}
    at = torch.tensor([False, False, False, False, True, False, True])
    assert torch.equal(prompt_tokens({**one, "logits_to_keep": at}), wanted[1:])
    with pytest.raises(ValueError, match=r"'labels' has shape \(1, 2\), 'input_ids' \(1, 7\)"):
        prompt_tokens(one)


def test_a_head_that_sees_unknown_tokens_is_not_counted_and_says_so():
    model, batch = llava(), llava_batch()
    optimizer = protected(model)

    def run():
        with optimizer.rule.observe(batch["input_ids"] == IMAGE, batch):
            model(**{key: x for key, x in batch.items() if key != "labels"}, logits_to_keep=3)
            return counts(optimizer)

    with pytest.warns(UserWarning, match="lm_head is run on a part of the sequence"):
        assert run()["lm_head"] == 0


class Attention(nn.Module):
    """Holds a layer whose weight it takes, but which it never calls."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x):
        return self.attention(*[self.proj(x)] * 3)[0]


def test_layers_that_are_never_called_are_told_once_by_name():
    model = Attention()
    optimizer = protected(model, text_module=model)
    mask = torch.ones(2, 3, dtype=torch.bool)
    x = torch.randn(2, 3, 4)

    def run(mask):
        with optimizer.rule.observe(mask):
            model(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(torch.zeros_like(mask))
    with pytest.warns(UserWarning, match=r"did not run these layers as modules.*: attention\.out_proj"):
        run(mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(mask)


def deepseek(**more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v3",
        **{key: x for key, x in LLAMA.items() if key not in ("model_type", "head_dim")}
        | {
            "num_key_value_heads": 2, "kv_lora_rank": 4, "q_lora_rank": 6, "qk_rope_head_dim": 4, "v_head_dim": 4,
            "qk_nope_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
        }
        | more,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_latent_attention_is_protected_and_routed_experts_are_left_out_by_name():
    model = deepseek()
    with pytest.warns(UserWarning, match=r"experts that a router sends tokens to are not protected: .*mlp\.experts\."):
        optimizer = protected(model)
    ids = torch.arange(12).view(2, 6)
    images = ids % 3 == 0
    with optimizer.rule.observe(images):
        model(input_ids=ids)
        found = counts(optimizer)
    assert any("kv_b_proj" in name for name in found)
    assert any("shared_experts" in name for name in found)
    assert not any(is_routed(name) for name in found)
    assert set(found.values()) == {int(images.sum())}


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((2, 6), True), ((2, 1, 6), True), ((12,), True), ((2, 6, 1), True), ((6, 2), False), ((2, 5), False)],
)
def test_shapes_whose_rows_are_tokens(shape, fits):
    mask = torch.rand(2, 6) > 0.5
    layer = Linear("one", nn.Linear(3, 3), in_text=True)
    if fits:
        assert torch.equal(rows(torch.zeros(*shape, 3), mask, layer), mask)
    else:
        with pytest.raises(ValueError, match="the input of one"):
            rows(torch.zeros(*shape, 3), mask, layer)
    layer.in_text = False
    assert rows(torch.zeros(*shape, 3), mask, layer) is None


def test_a_tower_inside_the_decoder_is_not_of_its_sequence():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_tower = nn.Sequential(nn.Linear(2, 2))
            self.visual_projection = nn.Linear(2, 2)
            self.layer = nn.Linear(2, 2)

    decoder = Decoder()
    places = {p: i for i, p in enumerate(decoder.parameters())}
    found = {layer.name: layer.in_text for layer in trained_linear_layers(decoder, places, decoder)}
    assert found == {"vision_tower.0": False, "visual_projection": False, "layer": True}


def test_a_step_of_a_vision_language_model_names_nothing_that_is_protected():
    model = llava()
    optimizer = protected(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            mdgd_backward(model, optimizer, llava_batch())
            optimizer.step()
            optimizer.zero_grad()
    told = [str(x.message) for x in told if "ProtectInputs" in str(x.message)]
    assert not told

"""VisualTap on every family of vision-language models, at any layer, wrapped, and in batches without pictures."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, T5Config, T5ForConditionalGeneration

from tests.models.families import FAMILIES, IMAGE, LLAMA, VIDEO, make_batch, make_model, make_text_model, text_only
from tests.properties import assert_same_bits
from torch_mdgd import MDGD, MDGDOptimizer, VisualTap, mdgd_backward, visual_alignment_loss


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def llava():
    return make_model("llava")


def assert_same(actual, wanted):
    assert actual.shape == wanted.shape
    assert_same_bits([actual], [wanted])


def hidden_states(model, batch):
    return model(**batch, output_hidden_states=True).hidden_states


def at_images(states, batch):
    return states[batch["input_ids"] == IMAGE]


def bits_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_z_is_the_last_hidden_state_at_the_image_tokens(family):
    model, batch = make_model(family), make_batch(family)
    output, z = VisualTap.for_model(model)(model, batch)
    assert z.shape == (2 * FAMILIES[family].image_tokens, 16)
    assert_same(z, at_images(hidden_states(model, batch)[-1], batch))
    assert_same(output.logits, model(**batch).logits)


def test_every_layer_is_the_one_of_output_hidden_states(family):
    model, batch = make_model(family), make_batch(family)
    states = hidden_states(model, batch)
    wanted = (0, 1, -2, 3, -4)
    _, z = VisualTap.for_model(model, layers=wanted)(model, batch)
    parts = z.split(2 * FAMILIES[family].image_tokens)
    assert len(parts) == len(wanted)
    for part, layer in zip(parts, wanted, strict=True):
        assert_same(part, at_images(states[layer], batch))


def test_pictures_move_z_and_z_moves_the_connector(family):
    model, batch = make_model(family), make_batch(family)
    tap = VisualTap.for_model(model)
    _, z = tap(model, batch)
    z.square().sum().backward()
    for name in FAMILIES[family].connector:
        gradients = [p.grad for p in model.get_submodule(name).parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), name
    darker = dict(batch, pixel_values=batch["pixel_values"] * 0.5)
    assert not torch.equal(tap(model, darker)[1], z)


def test_two_steps_move_weights_away_from_the_reference_and_stay_finite(family):
    model, batch = make_model(family), make_batch(family)
    optimizer = MDGDOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
    start, visual_losses = bits_of(model), []
    for _ in range(2):
        loss = mdgd_backward(model, optimizer, batch)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()
        visual_losses.append(optimizer.diagnostics["visual_loss"])
    assert all(p.isfinite().all() for p in model.parameters())
    decoder = [name for name in start if "layers.2" in name and "self_attn" in name and "norm" not in name]
    assert decoder
    for name in decoder:
        assert not torch.equal(start[name], model.get_parameter(name)), name
    # The first step starts at the reference itself, the second a step away from it.
    assert visual_losses[0] == 0 < visual_losses[1] < float("inf")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "minicpmv4_7"])
def test_a_text_only_batch_among_others_is_a_plain_step(name):
    model, ids = make_model(name), torch.tensor([[1, 5, 6, 7, 8, 9], [1, 10, 11, 12, 13, 14]])
    optimizer = MDGDOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), MDGD(regularize=0))
    mdgd_backward(model, optimizer, make_batch(name))
    optimizer.step()
    optimizer.zero_grad()
    plain = copy.deepcopy(model)
    batch = text_only(ids)

    _, z = VisualTap.for_model(model)(model, batch)
    assert z.shape == (0, 16)
    mdgd_backward(model, optimizer, batch)
    assert optimizer.diagnostics["visual_loss"] == 0
    plain(**batch).loss.backward()
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        # Without a gradient, not with one of zeros: weights that took no part must not decay.
        assert (p.grad is None) == (q.grad is None), key
        if q.grad is not None:
            assert_same(p.grad, q.grad)
    assert any(p.grad is None for p in model.parameters())
    before = bits_of(model)
    optimizer.step()
    assert any(not torch.equal(before[key], p) for key, p in model.named_parameters())
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_text_only_batch_with_gradients_at_the_reference():
    model = make_model("llava")
    optimizer = MDGDOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
    for batch in (make_batch("llava"), text_only(torch.tensor([[1, 5, 6, 7, 8, 9]])), make_batch("llava")):
        before = bits_of(model)
        assert mdgd_backward(model, optimizer, batch).isfinite()
        optimizer.step()
        optimizer.zero_grad()
        assert any(not torch.equal(before[key], p) for key, p in model.named_parameters())
    assert all(p.isfinite().all() for p in model.parameters())


def test_video_tokens_count_as_image_tokens():
    model = make_model("qwen2_vl")
    mask = VisualTap.for_model(model).mask({"input_ids": torch.tensor([[1, IMAGE, VIDEO, 5]])})
    assert mask.tolist() == [[False, True, True, False]]


def test_several_layers_weigh_alike_in_the_alignment(llava):
    batch = make_batch("llava")
    darker = dict(batch, pixel_values=batch["pixel_values"] * 0.5)

    def loss(layers):
        tap = VisualTap.for_model(llava, layers=layers)
        return visual_alignment_loss(tap(llava, batch)[1], tap(llava, darker)[1])

    torch.testing.assert_close(loss([1, -1]), (loss(1) + loss(-1)) / 2)
    assert loss(1) != loss(-1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_under_gradient_checkpointing_has_the_same_gradient(reentrant):
    batch, gradients = make_batch("llava"), []
    for checkpointing in (None, {"use_reentrant": reentrant}):
        model = make_model("llava")
        model.enable_input_require_grads()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(checkpointing)
        _, z = VisualTap.for_model(model, layers=[1, -1])(model, batch)
        z.square().sum().backward()
        gradients.append(model.model.multi_modal_projector.linear_1.weight.grad)
    # What is run again may be rounded otherwise.
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[0].abs().max()
    assert gradients[0].abs().sum() > 0


def test_last_image_and_last_instruction_token(family):
    model, batch = make_model(family), make_batch(family)
    tap = VisualTap.for_model(model, layers=[1, -1])
    states = hidden_states(model, batch)
    picture_ends = 2 + FAMILIES[family].image_tokens - 1  # after the first token and the mark of the picture's start
    _, z = tap.last_image_token()(model, batch)
    assert_same(z, torch.cat([states[1][:, picture_ends], states[-1][:, picture_ends]]))
    _, z = tap.last_instruction_token()(model, batch)
    assert_same(z, torch.cat([states[1][:, -3], states[-1][:, -3]]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_tokens_of_samples_of_several_lengths(side):
    rows = [[1, IMAGE, IMAGE, 5, 6, 7], [1, 5, 6, 7], [IMAGE, 5]]
    answers = [2, 1, 0]
    instruction_ends, picture_ends = [3, 2, 1], [2, None, 0]  # counted from the sample's first token
    batch = {"input_ids": torch.zeros(3, 6, dtype=torch.long)}
    batch |= {"attention_mask": batch["input_ids"].clone(), "labels": batch["input_ids"] - 100}
    expected_instruction, expected_picture = torch.zeros(3, 6, dtype=torch.bool), torch.zeros(3, 6, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = 6 - len(row) if side == "left" else 0
        batch["input_ids"][i, start : start + len(row)] = torch.tensor(row)
        batch["attention_mask"][i, start : start + len(row)] = 1
        for j in range(len(row) - answers[i], len(row)):
            batch["labels"][i, start + j] = row[j]
        expected_instruction[i, start + instruction_ends[i]] = True
        if picture_ends[i] is not None:
            expected_picture[i, start + picture_ends[i]] = True
    tap = VisualTap(nn.Identity(), lambda batch: batch["input_ids"] == IMAGE)
    assert torch.equal(tap.last_instruction_token().mask(batch), expected_instruction)
    assert torch.equal(tap.last_image_token().mask(batch), expected_picture)


def test_without_labels_or_padding_the_instruction_ends_with_the_sample():
    mask = VisualTap(nn.Identity(), lambda batch: None).last_instruction_token().mask({"input_ids": torch.ones(2, 3)})
    assert mask.tolist() == [[False, False, True]] * 2


def test_a_sample_without_instruction_is_refused(llava):
    batch = make_batch("llava")
    batch["labels"][1] = batch["input_ids"][1]
    with pytest.raises(ValueError, match="labels begin with the first token"):
        VisualTap.for_model(llava).last_instruction_token()(llava, batch)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_inside_a_peft_model(name):
    model, batch = make_model(name), make_batch(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about layers that it does not know
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    _, z = VisualTap.for_model(wrapped)(wrapped, batch)
    assert_same(z, at_images(hidden_states(wrapped, batch)[-1], batch))
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = MDGDOptimizer(torch.optim.AdamW(trainable, lr=1e-2))
    frozen, start = bits_of(model), [p.detach().clone() for p in trainable]
    for _ in range(2):
        mdgd_backward(wrapped, optimizer, batch)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.diagnostics["visual_loss"] > 0
    assert any(not torch.equal(a, p) for a, p in zip(start, trainable, strict=True))
    assert all(p.isfinite().all() for p in trainable)
    assert all(torch.equal(frozen[key], p) for key, p in model.named_parameters() if not p.requires_grad)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_inside_distributed_data_parallel_and_peft(one_process, llava):
    batch = make_batch("llava")
    for model in (llava, get_peft_model(make_model("llava"), LoraConfig(r=2, target_modules=["q_proj"]))):
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        _, z = VisualTap.for_model(wrapped)(wrapped, batch)
        assert_same(z, at_images(hidden_states(model, batch)[-1], batch))
        # Nothing is compiled before the first call.
        for compiled in (torch.compile(wrapped), nn.parallel.DistributedDataParallel(torch.compile(model))):
            assert VisualTap.for_model(compiled).text_module is VisualTap.for_model(model).text_module


def test_another_model_by_naming_its_text_module_and_a_mask():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.text = make_text_model()

        def forward(self, words, spans):
            return self.text(words, output_hidden_states=True)

    def mask(batch):
        positions = torch.arange(batch["words"].shape[1])
        return torch.stack([(positions >= start) & (positions < stop) for start, stop in batch["spans"]])

    model, batch = Other(), {"words": torch.arange(10).view(2, 5), "spans": [(1, 3), (0, 1)]}
    output, z = VisualTap(model.text.model, mask, layers=[2, -1])(model, batch)
    expected = [torch.cat([h[0, 1:3], h[1, 0:1]]) for h in (output.hidden_states[2], output.hidden_states[-1])]
    assert_same(z, torch.cat(expected))


def test_a_text_decoder_inside_a_head_is_tapped_before_it():
    """The language model of BLIP-2 is one with a head, whose output would be logits."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "blip-2", image_token_index=IMAGE, num_query_tokens=2,
        vision_config={**small, "image_size": 8, "patch_size": 4},
        qformer_config={**small, "encoder_hidden_size": 16, "vocab_size": 32},
        text_config={
            "model_type": "opt", "vocab_size": 32, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "dropout": 0.0,
        },
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config).eval()
    batch = text_only(torch.tensor([[1, IMAGE, IMAGE, 5, 6, 7]]))
    batch["pixel_values"] = torch.randn(1, 3, 8, 8)
    output, z = VisualTap.for_model(model)(model, batch)
    expected = model.language_model.lm_head(z)
    torch.testing.assert_close(expected, output.logits[batch["input_ids"] == IMAGE])


def mllama():
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_output_dim": 32, "max_num_tiles": 1}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    text = {k: v for k, v in LLAMA.items() if k not in ("model_type", "head_dim")}
    text |= {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = AutoConfig.for_model("mllama", vision_config=vision, text_config=text, image_token_index=IMAGE)
    return AutoModelForImageTextToText.from_config(config)


def t5():
    return T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=32))


@pytest.mark.parametrize(
    ("make", "error", "reason"),
    [
        (mllama, ValueError, "Mllama.* has no image tokens: it attends to pictures from outside its token sequence"),
        (t5, ValueError, "image tokens of T5.* are in its encoder"),
        (make_text_model, ValueError, "the configuration of LlamaForCausalLM names no image token; build VisualTap"),
        (lambda: nn.Linear(2, 2), TypeError, r"Linear is not a model of transformers.*VisualTap\(text_module, mask\)"),
    ],
)
def test_what_has_no_image_tokens_in_its_decoder_is_refused_with_the_reason(make, error, reason):
    with pytest.raises(error, match=reason):
        VisualTap.for_model(make())


@pytest.mark.parametrize("layers", [4, -5, [1, 4]])
def test_a_layer_that_does_not_exist_is_refused(llava, layers):
    with pytest.raises(ValueError, match="layers must be between -4 and 3"):
        VisualTap.for_model(llava, layers=layers)


def test_no_layers_at_all_are_refused(llava):
    with pytest.raises(ValueError, match="layers is empty"):
        VisualTap.for_model(llava, layers=[])


def test_a_text_module_without_a_list_of_layers_is_refused_at_other_layers():
    with pytest.raises(ValueError, match="Identity has no ModuleList called 'layers'"):
        VisualTap(nn.Identity(), lambda batch: None, layers=1)


def test_nothing_stays_on_the_model_also_after_an_exception(llava):
    def hooks():
        return [len(module._forward_hooks) for module in llava.modules()]

    tap = VisualTap.for_model(llava, layers=[0, 1, -1])
    batch = make_batch("llava")
    tap(llava, batch)  # output_hidden_states of earlier tests may have left hooks of transformers
    before = hooks()
    tap(llava, batch)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        tap(llava, dict(batch, pixel_values=batch["pixel_values"][:1]))
    assert hooks() == before

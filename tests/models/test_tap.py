"""Hidden states at image tokens, against what transformers itself returns, and the alignment loss."""

import collections

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.properties import assert_same_bits
from tests.tiny_models import IMAGE, VIDEO, llava, llava_batch, qwen, qwen_batch, text_batch
from torch_mdgd import VisualTap, visual_alignment_loss

MODELS = {"llava": (llava, llava_batch, 8), "qwen2-vl": (qwen, qwen_batch, 5)}


@pytest.mark.parametrize("name", MODELS)
def test_z_is_the_last_hidden_state_at_image_and_film_tokens(name):
    make, make_batch, count = MODELS[name]
    model, batch = make(), make_batch()
    output, z = VisualTap.for_model(model)(model, batch)
    plain = model(**batch, output_hidden_states=True)
    tokens = batch["input_ids"]
    wanted = plain.hidden_states[-1][(tokens == IMAGE) | (tokens == VIDEO)]
    assert z.shape == (count, 16)
    assert_same_bits([z], [wanted])
    assert_same_bits([output.loss], [plain.loss])


@pytest.mark.parametrize("name", MODELS)
def test_z_carries_its_graph(name):
    make, make_batch, _ = MODELS[name]
    model, batch = make(), make_batch()
    _, z = VisualTap.for_model(model)(model, batch)
    z.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "language_model.layers.0" in n)
    assert model.lm_head.weight.grad is None


def test_nothing_stays_on_the_model():
    model, batch = llava(), llava_batch()
    model(**batch)
    # Transformers has hooks of its own.
    before = [len(module._forward_hooks) for module in model.modules()]
    tap = VisualTap.for_model(model)
    tap(model, batch)
    with pytest.raises(ValueError, match="image tokens"):
        tap(model, {**batch, "pixel_values": batch["pixel_values"][:1]})
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_a_peft_model_and_any_mapping_of_inputs():
    model, batch = llava(), llava_batch()
    wanted = VisualTap.for_model(model)(model, batch)[1]
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    z = VisualTap.for_model(adapted)(adapted, collections.UserDict(batch))[1]
    assert_same_bits([z], [wanted])


def test_a_batch_without_pictures_has_no_visual_tokens():
    model = llava()
    output, z = VisualTap.for_model(model)(model, text_batch())
    assert z.shape == (0, 16)
    assert output.loss.isfinite()


class Toy(nn.Module):
    """A model that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.unused = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x, marks):
        return self.text(x)


def test_a_model_of_ones_own_names_its_text_module_and_mask():
    model = Toy()
    batch = {"x": torch.randn(2, 4, 2), "marks": torch.tensor([[True, False] * 2, [False] * 4])}
    output, z = VisualTap(model.text, lambda b: b["marks"])(model, batch)
    assert_same_bits([z], [output[0, [0, 2]]])
    with pytest.raises(RuntimeError, match="did not run its text module Linear"):
        VisualTap(model.unused, lambda b: b["marks"])(model, batch)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\), the hidden states \(2, 4, 3\)"):
        VisualTap(model.text, lambda b: b["marks"][:, :3])(model, batch)
    with pytest.raises(TypeError, match="Toy is not a model of transformers"):
        VisualTap.for_model(model)


def test_families_without_image_tokens_in_their_sequence_are_refused():
    from transformers import LlamaForCausalLM, MllamaConfig

    from tests.tiny_models import TEXT, LlamaConfig

    with pytest.raises(ValueError, match="LlamaForCausalLM names no image token"):
        VisualTap.for_model(LlamaForCausalLM(LlamaConfig(**TEXT)))
    model = llava()
    model.config = MllamaConfig()
    with pytest.raises(ValueError, match="attends to pictures from outside"):
        VisualTap.for_model(model)


def test_a_batch_without_tokens_is_refused():
    model, batch = llava(), llava_batch()
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match=r"no 'input_ids' to find image tokens in, only \['inputs_embeds'\]"):
        VisualTap.for_model(model)(model, {"inputs_embeds": embeds})


def test_alignment_loss_by_hand():
    z, z_ref = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 4.0], [0.0, 4.0]])
    assert visual_alignment_loss(z, z_ref).item() == 5 / 4
    assert visual_alignment_loss(z, z_ref, "mse").item() == 13 / 4


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_alignment_loss_of_equal_features_has_no_gradient_at_all(kind):
    z = torch.randn(3, 4, requires_grad=True)
    visual_alignment_loss(z, z.detach(), kind).backward()
    assert torch.equal(z.grad, torch.zeros(3, 4))


def test_alignment_loss_of_low_precision_is_taken_in_float32():
    z = torch.full((1, 3), 1.0, dtype=torch.bfloat16)
    z_ref = torch.full((1, 3), 1 / 512, dtype=torch.bfloat16)
    loss = visual_alignment_loss(z, z_ref)
    assert loss.dtype == torch.float32
    # 511 has nine bits, a bfloat16 eight.
    assert loss.item() == 511 / 512


@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_alignment_loss_of_no_tokens_is_zero_and_differentiable(kind):
    z = torch.zeros(0, 4, requires_grad=True)
    loss = visual_alignment_loss(z, torch.zeros(0, 4), kind)
    loss.backward()
    assert loss.item() == 0


def test_alignment_loss_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"z has shape \(2, 3\), z_ref \(3, 3\)"):
        visual_alignment_loss(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="kind must be 'l1' or 'mse', got 'cosine'"):
        visual_alignment_loss(torch.ones(2, 3), torch.ones(2, 3), "cosine")

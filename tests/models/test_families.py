"""General rules find tap, image tokens and connector: a representative dozen of families, built of their defaults.

``python -m docs.families`` does all of them, and runs those that it can.
"""

import pytest
import torch
import transformers
from torch import nn

from tests.models.families import IMAGE, make_batch, make_model
from torch_mdgd import VisualTap, connector
from torch_mdgd.models.parts import head_of, text_decoder

# The class, the decoder and the connector by name.
FOUND = {
    "llama4": ("Llama4ForConditionalGeneration", "language_model.model", ["multi_modal_projector"]),
    "phi4_multimodal": (
        "Phi4MultimodalForCausalLM",
        "model",
        [f"model.embed_tokens_extend.image_embed.img_projection_{x}" for x in ("up", "down")],
    ),
    "kosmos-2": ("Kosmos2ForConditionalGeneration", "text_model.model", ["image_to_text_projection"]),
    "colpali": ("ColPaliForRetrieval", "vlm.language_model", ["vlm.multi_modal_projector"]),
    "colqwen2": ("ColQwen2ForRetrieval", "vlm.language_model", ["vlm.visual.merger"]),
    "deepseek_vl": ("DeepseekVLForConditionalGeneration", "model.language_model", ["model.aligner"]),
    "janus": ("JanusForConditionalGeneration", "model.language_model", ["model.aligner"]),
    "ovis2": ("Ovis2ForConditionalGeneration", "model.language_model", ["model.visual_embeddings_table"]),
    "paddleocr_vl": ("PaddleOCRVLForConditionalGeneration", "model.language_model", ["model.projector"]),
    "lighton_ocr": ("LightOnOcrForConditionalGeneration", "model.language_model", ["model.vision_projection"]),
    "fuyu": ("FuyuForCausalLM", "model.language_model", ["model.vision_embed_tokens"]),
    "qwen3_omni_moe_thinker": (
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "model.language_model",
        ["model.visual.merger_list", "model.visual.merger"],
    ),
    "video_llava": ("VideoLlavaForConditionalGeneration", "model.language_model", ["model.multi_modal_projector"]),
    # Each has another decoder, of actions or of what is generated, that no picture enters.
    "pi0": ("PI0ForConditionalGeneration", "model.vlm.language_model", ["model.vlm.multi_modal_projector"]),
    "diffusion_gemma": (
        "DiffusionGemmaForBlockDiffusion",
        "model.encoder.language_model",
        ["model.encoder.embed_vision"],
    ),
    "molmo2": ("Molmo2ForConditionalGeneration", "model.language_model", ["model.multi_modal_projector"]),
}
# Without which the configuration cannot be built.
GIVEN = {
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8},
        "vision_config": {},
    }
}
REFUSED = {
    "MllamaForConditionalGeneration": "has no image tokens: it attends to pictures from outside its token sequence",
    "IdeficsForVisionText2Text": "has no image tokens: it attends to pictures from outside its token sequence",
    "BlipForConditionalGeneration": "has no image tokens: it attends to pictures from outside its token sequence",
    "GitForCausalLM": r"puts pictures in front of its tokens, where none stands for them: build VisualTap",
    "Florence2ForConditionalGeneration": r"are in its encoder: build VisualTap\(encoder, mask\).*get_encoder\(\)",
    "T5Gemma2ForConditionalGeneration": r"are in its encoder: build VisualTap\(encoder, mask\).*get_encoder\(\)",
    "Pix2StructForConditionalGeneration": "are in its encoder",
}


def on_meta(name):
    """A model of the default configuration, which takes no memory."""
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"this release of transformers has no {name}")
    with torch.device("meta"):
        return kind._from_config(kind.config_class(**GIVEN.get(name, {})))


@pytest.mark.parametrize("name", FOUND)
def test_general_rules_find_the_parts(name):
    kind, decoder, parts = FOUND[name]
    model = on_meta(kind)
    names = {id(module): key for key, module in model.named_modules()}
    tap = VisualTap.for_model(model)
    assert names[id(tap.text_module)] == decoder
    assert head_of(tap.text_module) is None
    found = connector(model)
    assert [names[id(x)] for x in ([found] if id(found) in names else found)] == parts


@pytest.mark.parametrize("name", REFUSED)
def test_families_without_image_tokens_in_their_decoder_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        VisualTap.for_model(on_meta(name))


def test_a_batchs_own_mask_marks_pictures_where_no_id_is_named():
    tap = VisualTap.for_model(on_meta("Kosmos2ForConditionalGeneration"))
    ids = torch.tensor([[1, 2, 3, 4]])
    batch = {"input_ids": ids, "image_embeds_position_mask": torch.tensor([[0, 1, 1, 0]])}
    assert tap.mask(batch).tolist() == [[False, True, True, False]]
    assert not tap.mask({"input_ids": ids}).any()


def test_ids_are_taken_from_the_outermost_configuration_that_names_any():
    model = make_model("llava")
    model.config.text_config.image_token_index = 5
    tap = VisualTap.for_model(model)
    assert tap.mask({"input_ids": torch.tensor([[5, IMAGE]])}).tolist() == [[False, True]]


class Headed(nn.Module):
    """A decoder of which nothing is without the head."""

    config = None

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.lm_head = nn.Linear(2, 2)

    def get_decoder(self):
        return self

    def get_output_embeddings(self):
        return self.lm_head


def test_a_decoder_whose_output_is_logits_is_refused():
    with pytest.raises(ValueError, match="has a head, so its output is logits"):
        text_decoder(Headed())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "smolvlm"])
def test_the_mask_is_checked_without_names(name):
    model, batch = make_model(name), make_batch(name)
    tap = VisualTap.for_model(model)
    assert tap.check(model, batch) is True
    assert model.training
    wrong = VisualTap(tap.text_module, lambda batch: batch["input_ids"] == 5)
    with pytest.warns(UserWarning, match="the tap marks 1, of which 1 are others"):
        assert wrong.check(model, batch) is False

"""A tiny random model of every family of vision-language models, and a batch for it: two samples, a picture each."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.tiny_models import built_once

VOCABULARY, IMAGE, VIDEO, START, END = 32, 31, 30, 29, 28
ROTATIONS = {"rope_type": "default", "mrope_section": [1, 1, 2]}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
LLAMA = {"model_type": "llama", **TEXT}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **VISION}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN_MARKS = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
MINICPM = {
    "text_config": {
        "model_type": "qwen3_5_text", **TEXT, "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "rope_parameters": {**ROTATIONS, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
    },
    "vision_config": {**VISION, "image_size": 32}, "insert_layer_id": 0,
    "image_token_id": IMAGE, "video_token_id": VIDEO,
}  # fmt: skip


class Family(NamedTuple):
    """What the configuration of a tiny model holds, what its pictures look like, and its parts by name."""

    config: dict[str, Any]
    pictures: dict[str, tuple[int, ...] | Tensor]  # a shape of random numbers, or the tensor itself
    image_tokens: int  # per sample
    connector: tuple[str, ...]
    marks: str | None = None  # the input that says which tokens are image tokens


def llava(**more: Any) -> dict[str, Any]:
    return {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": IMAGE, **more}


def qwen(**vision: Any) -> dict[str, Any]:
    text = {**TEXT, "rope_parameters": ROTATIONS}
    return {"text_config": text, "vision_config": QWEN_VISION | vision, "image_token_id": IMAGE, **QWEN_MARKS}


SQUARES = (2, 3, 8, 8)
PATCHES = {"pixel_values": (2 * 16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
STRIPS = {"pixel_values": (1, 3, 4, 2 * 64 * 4), "target_sizes": torch.tensor([[8, 8]] * 2)}
PROJECTOR = ("model.multi_modal_projector",)
FAMILIES: dict[str, Family] = {
    "llava": Family(llava(vision_feature_layer=-1), {"pixel_values": SQUARES}, 4, PROJECTOR),
    "llava_next": Family(
        llava(image_grid_pinpoints=[[8, 8]]),
        {"pixel_values": (2, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]] * 2)},
        4 + 2 * (2 + 1),  # the picture, and its one tile with a newline after each row
        PROJECTOR,
    ),
    "llava_onevision": Family(
        llava(vision_config=SIGLIP, video_token_index=VIDEO, image_grid_pinpoints=[[8, 8]]),
        {"pixel_values": (2, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]] * 2)},
        4 + 2 * (2 + 1),
        PROJECTOR,
    ),
    "qwen2_vl": Family(
        qwen(embed_dim=16, mlp_ratio=2), PATCHES, 4, ("model.visual.merger",), "mm_token_type_ids",
    ),
    "qwen2_5_vl": Family(
        qwen(out_hidden_size=16, intermediate_size=24, window_size=16, fullatt_block_indexes=[1]),
        PATCHES, 4, ("model.visual.merger",), "mm_token_type_ids",
    ),
    "qwen3_vl": Family(
        qwen(
            out_hidden_size=16, intermediate_size=24, num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
        ),
        PATCHES, 4, ("model.visual.merger", "model.visual.deepstack_merger_list"), "mm_token_type_ids",
    ),
    "smolvlm": Family(
        {"text_config": LLAMA, "vision_config": {**VISION, "image_size": 16}, "image_token_id": IMAGE},
        {"pixel_values": (2, 1, 3, 16, 16)}, 4, ("model.connector",),
    ),
    "idefics3": Family(
        {"text_config": LLAMA, "vision_config": {**VISION, "image_size": 16}, "image_token_id": IMAGE},
        {"pixel_values": (2, 1, 3, 16, 16)}, 4, ("model.connector",),
    ),
    "gemma3": Family(
        {
            "text_config": TEXT, "vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_index": IMAGE,
            "boi_token_index": START, "eoi_token_index": END,
        },
        {"pixel_values": SQUARES}, 4, PROJECTOR, "token_type_ids",
    ),
    "paligemma": Family(
        {
            "text_config": {"model_type": "gemma", **TEXT}, "vision_config": SIGLIP, "image_token_index": IMAGE,
            "projection_dim": 16, "hidden_size": 16,
        },
        {"pixel_values": SQUARES}, 4, PROJECTOR, "token_type_ids",
    ),
    "internvl": Family(
        {
            "text_config": {"model_type": "qwen2", **TEXT}, "image_token_id": IMAGE,
            "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        },
        {"pixel_values": (2, 3, 16, 16)}, 4, PROJECTOR,
    ),
    "minicpmv4_6": Family(MINICPM, STRIPS, 4, ("model.merger",)),
    "minicpmv4_7": Family(
        {
            **MINICPM, "image_start_id": START, "image_end_id": END,
            "slice_start_id": 27, "slice_end_id": 26, "newline_id": 25,
        },
        STRIPS, 4, ("model.merger",), "mm_token_type_ids",
    ),
}  # fmt: skip


@built_once
def make_model(name: str) -> nn.Module:
    """The family's tiny model, with random weights that are large enough to matter, in training mode."""
    config = AutoConfig.for_model(name, **FAMILIES[name].config)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def make_text_model() -> nn.Module:
    """A language model that sees no pictures."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))


def make_batch(name: str) -> dict[str, Tensor]:
    """Two samples of one length: a beginning, a picture, an instruction of three tokens, an answer of two."""
    generator = torch.Generator().manual_seed(1)
    family = FAMILIES[name]
    picture = [START, *[IMAGE] * family.image_tokens, END]
    ids = torch.tensor([[1, *picture, 5, 6, 7, 8, 9], [1, *picture, 10, 11, 12, 13, 14]])
    batch = text_only(ids)
    for key, value in family.pictures.items():
        batch[key] = value if isinstance(value, Tensor) else torch.randn(value, generator=generator)
    if family.marks is not None:
        batch[family.marks] = (ids == IMAGE).long()
    return batch


def text_only(ids: Tensor) -> dict[str, Tensor]:
    """A batch without pictures, whose answers are its last two tokens."""
    labels = ids.clone()
    labels[:, :-2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

"""What a family needs besides the general rules of ``docs.families``, to be built small and to be run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

IMAGE = 60
# The places of 4 × 4 patches, and of 2 × 2, of two pictures.
PLACES, FEW = (torch.cartesian_prod(torch.arange(n), torch.arange(n))[None].repeat(2, 1, 1) for n in (4, 2))
GRIDS = torch.tensor([[1, 4, 4]] * 2)
PIXELS = torch.tensor([[16, 16]] * 2)
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
MARKS = {"vision_start_token_id": 50, "vision_end_token_id": 51}
SAM = {"downsample_channels": [32, 32], "output_channels": 32, "mlp_dim": 32, "image_size": 64}
DISCRETE = {
    "embed_dim": 8, "num_embeddings": 8, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}  # fmt: skip
ROTATED = {**DEFAULT, "mrope_section": [2, 2, 4]}


def of_embeddings(output: Any) -> Tensor:
    """A loss for what has none of its own: models that retrieve."""
    loss: Tensor = output.embeddings[:, -2:, 0].mean()
    return loss


class Entry(NamedTuple):
    """What a family is given.

    Attributes:
        config: what its configuration is made with, and what stays as it is; nothing if None.
        inputs: beside tokens: shapes of random numbers, or tensors; those of the general rules if None.
        tokens: for each picture; found by trying if None.
        loss: of the model's output; its own if None.
    """

    config: dict[str, Any] | None = None
    inputs: dict[str, Any] | None = None
    tokens: int | None = None
    loss: Callable[[Any], Tensor] | None = None


BY_HAND: dict[str, Entry] = {
    "aria": Entry({"projector_patch_to_query_dict": {16: 4}}),
    "blip-2": Entry(tokens=2),
    "chameleon": Entry(
        {
            "vocabulary_map": {"<image>": IMAGE, **{f"IMGIMG{'ABCDEFGH'[i]}Z": 20 + i for i in range(8)}},
            "vq_config": {**DISCRETE, "resolution": 8},
        },
        {"pixel_values": (2, 3, 8, 8)},
    ),
    "cohere_compass": Entry({"text_config": {"rope_parameters": {"full_attention": DEFAULT}}}),
    "colpali": Entry(loss=of_embeddings),
    "colqwen2": Entry(
        {"vlm_config": {"model_type": "qwen2_vl", "text_config": {"rope_parameters": ROTATED}}},
        {"pixel_values": (2, 16, 3 * 2 * 4 * 4), "image_grid_thw": GRIDS},
        tokens=4,
        loss=of_embeddings,
    ),
    "deepseek_ocr2": Entry(
        {
            "vision_config": {"sam_config": SAM},
            "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "head_dim": 16},
        },
        {"pixel_values": (2, 3, 64, 64)},
        tokens=145,
    ),
    "diffusion_gemma": Entry(
        {
            "canvas_length": 4, "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
            "vision_config": {"pooling_kernel_size": 2},
        },
        {"pixel_values": (2, 16, 3 * 4 * 4), "image_position_ids": PLACES},
        loss=lambda output: output.logits[..., 0].mean(),
    ),
    "dots3_note": Entry(
        {
            "vision_config": {
                "hidden_size": 32, "num_attention_heads": 2, "adapter_in_dim": 32, "adapter_out_dim": 32,
                "mlp_layer_types": ["dense", "sparse"],
            },
            "audio_config": {
                "hidden_size": 32, "num_attention_heads": 2, "adapter_input_size": 32, "adapter_out_dim": 32,
                "downsample_hidden_size": 8,
            },
            "text_config": {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "qk_rope_head_dim": 16},
        },
    ),
    "emu3": Entry(
        {
            "vocabulary_map": {
                "<image>": IMAGE, "<|extra_200|>": 40, **{f"<|visual token 00000{i}|>": 20 + i for i in range(8)}
            },
            "vq_config": {**DISCRETE, "codebook_size": 8, "hidden_size": 32, "attn_resolutions": [3]},
        },
    ),
    "ernie4_5_vl_moe": Entry({"text_config": {"rope_parameters": {**DEFAULT, "mrope_section": [3, 3, 2]}}}),
    "fast_vlm": Entry(
        {
            "vision_config": {
                "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg", "hidden_size": 128,
                "model_args": {"layers": [1] * 5, "embed_dims": [8, 8, 16, 32, 64], "inference_mode": True},
            }
        },
        {"pixel_values": (2, 3, 128, 128)},
    ),
    "fuyu": Entry(inputs={"pixel_values": (2, 16, 3 * 4 * 4)}),
    "gemma3n": Entry(
        {
            "text_config": {"num_hidden_layers": 2, "num_kv_shared_layers": 0},
            "vision_config": {"architecture": "test_efficientnet", "hidden_size": 256},
            "vision_soft_tokens_per_image": 4,
        },
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "gemma4": Entry(
        {"vision_config": {"pooling_kernel_size": 2}},
        {"pixel_values": (2, 16, 3 * 4 * 4), "image_position_ids": PLACES},
    ),
    "gemma4_unified": Entry(
        {"vision_config": {"pooling_kernel_size": 2, "mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 4}},
        {"pixel_values": (2, 4, 3 * 8 * 8), "image_position_ids": FEW},
    ),
    "granite4_vision": Entry(
        {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]], "image_grid_pinpoints": [[16, 16]]}
    ),
    "granite_docling": Entry(
        inputs={"pixel_values": (2, 1, 3, 16, 16), "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool)}
    ),
    "hunyuan_vl": Entry(
        {"text_config": {"head_dim": 16, "rope_parameters": {**DEFAULT, "mrope_section": [2, 2, 2, 2]}}}
    ),
    "inkling2": Entry(inputs={"pixel_values": (8, 8, 8, 3), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)}),
    "instructblip": Entry(
        inputs={"pixel_values": (2, 3, 16, 16), "qformer_input_ids": torch.tensor([[1, 2, 3]] * 2)}, tokens=2
    ),
    "inkling_mm_model": Entry(inputs={"pixel_values": (8, 2, 4, 4, 3)}),
    "instructblipvideo": Entry(
        {"video_token_index": IMAGE},
        {"pixel_values": (2, 4, 3, 16, 16), "qformer_input_ids": torch.tensor([[1, 2, 3]] * 2)},
        tokens=4 * 2,
    ),
    "janus": Entry({"vq_config": {**DISCRETE, "num_patches": 4, "projection_dim": 32, "image_token_embed_dim": 32}}),
    "kimi_k25": Entry({"projection_hidden_size": 32}, {"pixel_values": (32, 3, 4, 4), "image_grid_thw": GRIDS}),
    "kosmos-2.5": Entry(tokens=4),
    "llama4": Entry(
        {"vision_config": {"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32}}
    ),
    "molmo2": Entry(
        inputs={
            "pixel_values": (2, 16, 3 * 4 * 4), "image_token_pooling": torch.arange(32).view(8, 4),
            "image_grids": torch.tensor([[2, 2, 0, 0]] * 2), "image_num_crops": torch.tensor([1, 1]),
        },
    ),
    "muse_glimmer": Entry({"out_hidden_size": 4 * 32}),
    "muse_spark": Entry({"out_hidden_size": 4 * 32}),
    "nemotron_h_omni": Entry(
        {"vision_config": {"patch_size": 16, "video_temporal_patch_size": 2}},
        {"pixel_values": (32, 3 * 16 * 16), "image_grid_hw": torch.tensor([[4, 4]] * 2)},
        tokens=4,
    ),
    "paddleocr_vl": Entry(
        {"text_config": {"rope_parameters": ROTATED}}, {"pixel_values": (32, 3, 4, 4), "image_grid_thw": GRIDS}
    ),
    "perception_lm": Entry(
        {
            "vision_config": {
                "architecture": "vit_pe_core_tiny_patch16_384", "do_pooling": False,
                "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [16, 16], "patch_size": 4},
            }
        },
    ),
    "phi4_multimodal": Entry(
        {"vision_config": {"crop_size": 16, "num_hidden_layers": 3}},
        {
            "image_pixel_values": (2, 2, 3, 16, 16), "image_sizes": PIXELS,
            "image_attention_mask": torch.ones(2, 2, 4, 4, dtype=torch.bool),
        },
    ),
    "pi0": Entry(
        inputs={
            "pixel_values": (2, 1, 3, 16, 16), "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
            "state": (2, 32), "actions": (2, 50, 32),
        },
        tokens=16,
    ),
    "qwen2_5_omni_thinker": Entry({**MARKS, "text_config": {"rope_parameters": ROTATED}}),
    "qwen3_omni_moe_thinker": Entry(MARKS),
    "qwen4_exp": Entry(
        {
            "text_config": {
                "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "head_dim": 16,
                "indexer_budget": 64, "indexer_compress_ratio": 2, "hc_count": 2, "hc_lowrank": 8,
                "ngram_vocab_size_base": 64,
            }
        },
    ),
    "step3p7": Entry({"text_config": {"sliding_window": 64}}),
    "unlimited_ocr": Entry({"vision_config": {"sam_config": SAM}}, {"pixel_values": (2, 3, 64, 64)}),
}  # fmt: skip

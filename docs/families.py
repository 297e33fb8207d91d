"""``python -m docs.families > docs/families.md``: what the general rules find in each vision-language family.

Each family of the installed transformers is built with random weights. Where its configuration can be made small
without a word about it, a batch with two pictures is run through a training step besides.
"""

import inspect
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from torch_mdgd import MDGDOptimizer, VisualTap, connector, mdgd_backward

# Small by hand.
FAMILIES: dict[str, Any] = import_module("tests.models.families").FAMILIES
# What is not among transformers' own families of this kind.
OTHERS = {
    "phi4_multimodal": "Phi4MultimodalForCausalLM",
    "colpali": "ColPaliForRetrieval",
    "colqwen2": "ColQwen2ForRetrieval",
}
# Sizes by name: all that has to be equal somewhere is equal everywhere.
WIDTHS = (
    "hidden_size", "embed_dim", "d_model", "out_hidden_size", "projection_dim", "projector_hidden_size",
    "encoder_hidden_size", "word_embed_proj_dim", "vision_output_dim", "output_hidden_size", "text_hidden_size",
)  # fmt: skip
SIZES = {
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    "head_dim": 16, "vocab_size": 64, "patch_size": 4, "image_size": 16, "spatial_merge_size": 2,
    "max_position_embeddings": 2048, "num_position_embeddings": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "window_size": 16, "num_query_tokens": 2,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "mm_tokens_per_image": 4, "sliding_window": 64, "shared_expert_intermediate_size": 32, "num_image_tokens": 4,
    "latent_query_num": 4, "n_group": 1, "topk_group": 1,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
# What a family asks besides, by the configuration inside.
ASKED: dict[str, dict[str, int]] = {
    "llama4_vision_model": {"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32},
}
IMAGE, VIDEO, OTHER = 60, 61, 40


def families() -> dict[str, str]:
    """Names of families and of their classes."""
    return {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **OTHERS}


def shrink(config: Any, ids: Iterator[int]) -> Any:
    """Make a configuration and those inside it small, in place."""
    for key, value in list(vars(config).items()):
        if value is None and key in ("image_token_id", "image_token_index"):
            setattr(config, key, IMAGE)
        elif hasattr(value, "model_type"):
            shrink(value, ids)
        elif isinstance(value, int) and not isinstance(value, bool):
            if key in ("image_token_id", "image_token_index", "image_patch_id"):
                setattr(config, key, IMAGE)
            elif key in ("video_token_id", "video_token_index"):
                setattr(config, key, VIDEO)
            elif key in SIZES:
                setattr(config, key, SIZES[key])
            elif "token" in key and key.endswith(("_id", "_index")):
                setattr(config, key, next(ids))
        elif key == "rope_parameters" and ("mrope_section" in (value or ()) or "glm" in config.model_type):
            # A half of what is rotated of each head.
            half = int(SIZES["head_dim"] * (value.get("partial_rotary_factor") or 1) / 2)
            setattr(config, key, {**value, "mrope_section": [half // 4, half // 4, half - half // 4 * 2]})
        elif key == "layer_types" and value:
            setattr(config, key, value[-2:])
        elif key == "vision_feature_layers":
            setattr(config, key, [-1, -2])
        elif key in ("deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes"):
            setattr(config, key, [0, 1])
    for key, size in ASKED.get(config.model_type, {}).items():
        setattr(config, key, size)
    return config


def build(name: str, kind: Any) -> nn.Module:
    """A small model, in training mode, with weights that are large enough to matter."""
    torch.manual_seed(0)
    if name in FAMILIES:
        config = kind.config_class(**FAMILIES[name].config)
    else:
        config = shrink(kind.config_class(), itertools.cycle(range(OTHER, IMAGE)))
    model: nn.Module = kind._from_config(config)
    if sum(p.numel() for p in model.parameters()) > 1 << 26:
        raise ValueError("its configuration cannot be made small without a word about it")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def pictures(name: str, model: Any) -> Iterator[dict[str, Tensor]]:
    """Two pictures, in the forms that families take them in."""
    takes = inspect.signature(model.forward).parameters
    if name in FAMILIES:
        shapes = FAMILIES[name].pictures.items()
        yield {key: x if isinstance(x, Tensor) else torch.randn(x) for key, x in shapes}
        return
    vision = getattr(model.config, "vision_config", model.config)
    patch, time = getattr(vision, "patch_size", 4), getattr(vision, "temporal_patch_size", None) or 1
    size = getattr(vision, "image_size", 16)
    size, patch = (x[0] if isinstance(x, list | tuple) else x for x in (size or 16, patch))
    flat = torch.randn(2 * 16, 3 * time * patch * patch)
    grids = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    extra = {"image_sizes": torch.tensor([[size, size]] * 2)} if "image_sizes" in takes else {}
    if "image_grid_thw" in takes and "image_merge_sizes" not in takes:
        yield {"pixel_values": flat, **grids}
        yield {"pixel_values": flat.view(32, 3, time, patch, patch).squeeze(2), **grids}
        yield {"pixel_values": flat.view(32, 3, time, patch, patch)[:, :, 0].flatten(1), **grids}
        yield {"pixel_values": flat.view(32, 3, time, patch, patch)[None, :, :, 0], **grids}
        yield {"pixel_values": torch.cat([flat, flat], 1), **grids}
    if "image_merge_sizes" in takes:
        yield {"pixel_values": flat, **grids, "image_merge_sizes": torch.tensor([2, 2])}
    if "spatial_shapes" in takes:
        yield {
            "pixel_values": torch.randn(2, 16, 3 * patch * patch), "spatial_shapes": torch.tensor([[4, 4]] * 2),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        }  # fmt: skip
    if "target_sizes" in takes:
        yield {"pixel_values": torch.randn(1, 3, patch, 2 * 64 * patch), "target_sizes": torch.tensor([[8, 8]] * 2)}
    key = next((k for k in ("pixel_values", "pixel_values_images", "image_pixel_values") if k in takes), "pixel_values")
    for shape in ((2, 3, size, size), (2, 1, 3, size, size), (2, 2, 3, size, size)):
        yield {key: torch.randn(shape), **extra}
    for other in ("high_res_pixel_values", "pixel_values_local"):
        if other in takes:
            yield {"pixel_values": torch.randn(2, 3, size, size), other: torch.randn(2, 3, size, size)}


def batch_of(name: str, model: Any, shown: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Two samples with a picture each, of so many image tokens."""
    takes = inspect.signature(model.forward).parameters
    image = 31 if name in FAMILIES else IMAGE
    ids = torch.tensor([[1, *[image] * count, 5, 6, 7, 8, 9], [1, *[image] * count, 10, 11, 12, 13, 14]])
    labels = ids.clone()
    labels[:, :-2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **shown}
    for key in ("mm_token_type_ids", "token_type_ids", "image_embeds_position_mask", "moe_mm_token_type_ids"):
        if key in takes:
            batch[key] = (ids == image).long()
    return batch


def first_that_runs(name: str, model: Any) -> dict[str, Tensor]:
    """The first batch that the model takes, and that has as many image tokens as its pictures make."""
    errors: list[Exception] = [ValueError("no form of pictures is known")]
    for shown in pictures(name, model):
        counts = [FAMILIES[name].image_tokens] if name in FAMILIES else list(range(1, 40))
        while counts:
            batch = batch_of(name, model, shown, counts.pop(0))
            try:
                with torch.no_grad():
                    output = model(**batch)
                if getattr(output, "loss", None) is None:
                    raise ValueError(f"{type(output).__name__} has no loss")
                return batch
            except Exception as error:
                wanted = re.search(r"features:? (\d+)", str(error))
                if wanted is None:
                    errors.append(error)
                    counts = counts if "shape" in str(error) else []
                elif len(counts) == 38:
                    # Of both samples; some count numbers in place of rows.
                    counts = [int(wanted[1]) // 2, int(wanted[1]) // 2 // SIZES["hidden_size"], *counts]
    raise errors[min(1, len(errors) - 1)]


def step(name: str, model: Any) -> tuple[str, str]:
    """Image tokens of a sample, and how the passes of one step have gone."""
    batch = first_that_runs(name, model)
    tap = VisualTap.for_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = tap.check(model, batch)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.01))
    runs: list[None] = []
    handle = tap.text_module.register_forward_hook(lambda *args: runs.append(None))
    mdgd_backward(model, optimizer, batch, tap=tap)
    handle.remove()
    drift = optimizer.diagnostics["visual_loss"]
    optimizer.step()
    optimizer.zero_grad()
    mdgd_backward(model, optimizer, batch, tap=tap)
    moved = optimizer.diagnostics["visual_loss"]
    model.eval()
    with torch.no_grad():
        z = tap(model, batch)[1]
        states = model(**batch, output_hidden_states=True).hidden_states
    exact = states is not None and torch.equal(states[-1][tap.mask(batch)], z)
    said = [
        f"{len(runs)} forward" + ("" if len(runs) == 3 else ": the kernels without gradients are others"),
        "z is the last hidden state" if exact else "z not compared",
        "L_v 0, then > 0" if drift == 0 < moved else f"**L_v {drift:.2g}, then {moved:.2g}**",
        *{None: [], True: ["what is replaced is marked"], False: ["**other tokens are replaced than marked**"]}[seen],
    ]
    return str(int(tap.mask(batch).sum()) // 2), "; ".join(said)


def row(name: str, kind: Any) -> list[str]:
    """A family's row of the table."""
    try:
        model, small = build(name, kind), True
    except Exception as error:
        why, small = told(error), False
        try:
            with torch.device("meta"):
                model = kind._from_config(kind.config_class())
        except Exception as error:
            return [name, "–", "–", "–", f"not built: {told(error)}"]
    names = {id(module): key for key, module in model.named_modules()}
    try:
        text = VisualTap.for_model(model)
        tap = f"`{names[id(text.text_module)] or 'itself'}`"
    except (TypeError, ValueError) as error:
        tap, refused = "refused", str(error).removeprefix("VisualTap: ").partition("; build")[0].partition(": build")[0]
        return [name, tap, "–", found_connector(model, names), refused]
    if not small:
        return [name, tap, "–", found_connector(model, names), f"not run: {why}"]
    try:
        tokens, passes = step(name, model)
    except Exception as error:
        tokens, passes = "–", f"not run: {told(error)}"
    return [name, tap, tokens, found_connector(model, names), passes]


def found_connector(model: nn.Module, names: dict[int, str]) -> str:
    """Names of the connector's parts."""
    try:
        found = connector(model)
    except ValueError:
        return "none"
    parts = [found] if id(found) in names else list(found.children())
    return ", ".join(f"`{names[id(part)]}`" for part in parts)


def told(error: Exception) -> str:
    """The beginning of an error's message, in one cell."""
    message = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__} {message[:70]}".strip()


def main(only: list[str]) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    print("# Families\n")
    print(f"Made by `python -m docs.families` with transformers {transformers.__version__}. Models are random, and")
    print("small where a configuration can be made small without a word about its family; a row that was not run tells")
    print("what the rules find in the model as its configuration's defaults build it.\n")
    print("| family | tap | image tokens | connector | passes |")
    print("|---|---|---|---|---|")
    for name, kind in families().items():
        if not only or name in only:
            print("| " + " | ".join(row(name, getattr(transformers, kind))) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

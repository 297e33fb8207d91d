"""``python -m docs.families > docs/families.md``: what the general rules find in each vision-language family.

Each family of the installed transformers is built small with random weights, and a batch with two pictures is run
through two training steps. ``docs.by_hand`` has what a family needs for that besides the general rules of this file.
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

from docs.by_hand import BY_HAND, IMAGE, Entry
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
    "encoder_hidden_size", "word_embed_proj_dim", "vision_output_dim", "vision_hidden_size", "output_hidden_size",
    "text_hidden_size",
)  # fmt: skip
SIZES = {
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    "head_dim": 16, "vocab_size": 64, "patch_size": 4, "image_size": 16, "spatial_merge_size": 2,
    "max_position_embeddings": 2048, "num_position_embeddings": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "window_size": 16, "num_query_tokens": 2,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "mm_tokens_per_image": 4, "sliding_window": 64, "shared_expert_intermediate_size": 32, "num_image_tokens": 4,
    "latent_query_num": 4, "n_group": 1, "topk_group": 1, "merged_hidden_size": 4 * 32,
    "index_head_dim": 16, "index_n_heads": 2,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_heads": 2, "linear_head_dim": 8,
}  # fmt: skip
VIDEO, OTHER = 61, 40


def families() -> dict[str, str]:
    """Names of families and of their classes."""
    return {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **OTHERS}


def shrink(config: Any, given: Any, ids: Iterator[int]) -> Any:
    """Make a configuration and those inside it small, in place; what was given stays."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            shrink(value, given.get(key, {}), ids)
        elif key in given:
            pass
        elif value is None and key in ("image_token_id", "image_token_index"):
            setattr(config, key, IMAGE)
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
        elif key in ("vision_feature_layers", "vision_feature_layer") and isinstance(value, list | tuple):
            setattr(config, key, [-1, -2])
        elif key == "image_grid_pinpoints" and value:
            setattr(config, key, [[SIZES["image_size"]] * 2])
        elif key in ("deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes"):
            setattr(config, key, [0, 1])
    return config


def build(name: str, kind: Any) -> nn.Module:
    """A small model, in training mode, with weights that are large enough to matter."""
    torch.manual_seed(0)
    given = BY_HAND.get(name, Entry()).config or {}
    if name in FAMILIES:
        config = kind.config_class(**FAMILIES[name].config)
    else:
        config = shrink(kind.config_class(**given), given, itertools.cycle(range(OTHER, IMAGE)))
    model: nn.Module = kind._from_config(config)
    if sum(p.numel() for p in model.parameters()) > 1 << 26:
        raise ValueError("its configuration cannot be made small by general rules")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def pictures(name: str, model: Any) -> Iterator[dict[str, Tensor]]:
    """Two pictures, in the forms that families take them in."""
    takes = inspect.signature(model.forward).parameters
    shapes = FAMILIES[name].pictures if name in FAMILIES else BY_HAND.get(name, Entry()).inputs
    if shapes is not None:
        yield {key: torch.randn(x) if isinstance(x, tuple) else x for key, x in shapes.items()}
        return
    vision = getattr(model.config, "vision_config", model.config)
    times = (getattr(vision, key, None) for key in ("temporal_patch_size", "patch_temporal"))
    patch, time = getattr(vision, "patch_size", 4), next(filter(None, times), 1)
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
        known = FAMILIES[name].image_tokens if name in FAMILIES else BY_HAND.get(name, Entry()).tokens
        counts = list(range(1, 40)) if known is None else [known]
        while counts:
            batch = batch_of(name, model, shown, counts.pop(0))
            try:
                with torch.no_grad():
                    loss_of(name, model(**batch))
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


def loss_of(name: str, output: Any) -> Tensor:
    """The loss that a family is trained with."""
    given = BY_HAND.get(name, Entry()).loss
    loss: Tensor | None = getattr(output, "loss", None) if given is None else given(output)
    if loss is None:
        raise ValueError(f"{type(output).__name__} has no loss")
    return loss


def hidden_states(model: Any, batch: Any) -> Any:
    """What the decoder's layers make, as the model itself tells; None if it does not, or cannot."""
    try:
        output = model(**batch, output_hidden_states=True)
    except Exception:
        return None
    inner = getattr(output, "language_model_outputs", None)
    return getattr(output, "hidden_states", None) or getattr(inner, "hidden_states", None)


def step(name: str, model: Any) -> tuple[str, str]:
    """Image tokens of a sample, and how the passes of one step have gone."""
    batch = first_that_runs(name, model)
    tap = VisualTap.for_model(model)

    def loss(batch: Any) -> Tensor:
        return loss_of(name, model(**batch))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = tap.check(model, batch)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.01))
    runs: list[None] = []
    handle = tap.text_module.register_forward_hook(lambda *args: runs.append(None))
    mdgd_backward(model, optimizer, batch, tap=tap, loss=loss)
    handle.remove()
    drift = optimizer.diagnostics["visual_loss"]
    optimizer.step()
    optimizer.zero_grad()
    mdgd_backward(model, optimizer, batch, tap=tap, loss=loss)
    moved = optimizer.diagnostics["visual_loss"]
    model.eval()
    with torch.no_grad():
        z = tap(model, batch)[1]
        states = hidden_states(model, batch)
    shown = states is not None and states[-1].shape[:2] == tap.mask(batch).shape
    exact = shown and torch.equal(states[-1][tap.mask(batch)], z)
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
    print("small by `docs/families.py` and `docs/by_hand.py`; a row that was not run tells what the rules find in the")
    print(
        "model as its configuration's defaults build it. The towers of fast_vlm, gemma3n and perception_lm are timm's"
    )
    print("(`pip install timm torchvision`).\n")
    print(
        "A step runs the model as far as the features without a graph, at θ and at φ, and once for the loss: 3 forward"
    )
    print('passes, and one more where passes without gradients take other kernels. "z is the last hidden state": the')
    print('tapped features are those of `output_hidden_states=True`, bit for bit. "What is replaced is marked": what')
    print("enters the decoder differs from the embedding table at the marked tokens and nowhere else.\n")
    print("| family | tap | image tokens | connector | passes |")
    print("|---|---|---|---|---|")
    rows: list[list[str]] = []
    for name, kind in families().items():
        if not only or name in only:
            rows.append(row(name, getattr(transformers, kind)))
            print("| " + " | ".join(rows[-1]) + " |", flush=True)
    ran, refused = sum(" forward" in x[4] for x in rows), sum(x[1] == "refused" for x in rows)
    print(f"\nOf {len(rows)} families {ran} were run; the tap refuses {refused}, by the reason in the last column.")


if __name__ == "__main__":
    main(sys.argv[1:])

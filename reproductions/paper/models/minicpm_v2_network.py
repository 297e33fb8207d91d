"""MiniCPM-V-2.0 in plain torch around transformers' Granite, under the names that its published weights have.

Its own code, which comes with the weights, was written for transformers 4.36 and cannot be imported by transformers 5.
This has the same interface: ``forward(data, **kwargs)`` over a dictionary with ``input_ids``, ``position_ids``,
``pixel_values`` (a list of slices for each row) and ``image_bound`` (where they go), and no ``labels``.

The language model is MiniCPM-2.4B, which is Granite under other names: ``scale_emb`` multiplies embeddings,
``scale_depth`` / √layers what each block adds, and logits are divided by ``hidden_size / dim_model_base``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GraniteConfig, GraniteForCausalLM

from reproductions.paper.models.slices import SliceSettings, cut

IMAGE_START, IMAGE_END, SLICE_START, SLICE_END, UNKNOWN = "<image>", "</image>", "<slice>", "</slice>", "<unk>"


@dataclass(frozen=True)
class MiniCPMV2Settings:
    """The entries of the published ``config.json`` that shape the network, and those of its vision tower.

    The defaults are the published values; ``vision_*`` are those of timm's ``vit_so400m_patch14_siglip_384``.
    """

    vocab_size: int = 122753
    hidden_size: int = 2304
    intermediate_size: int = 5760
    num_hidden_layers: int = 40
    num_attention_heads: int = 36
    num_key_value_heads: int = 36
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    dim_model_base: int = 256
    initializer_range: float = 0.1
    query_num: int = 64
    resampler_head: int = 128
    patch_size: int = 14
    max_slice_nums: int = 9
    scale_resolution: int = 448
    drop_vision_last_layer: bool = True
    vision_width: int = 1152
    vision_hidden: int = 4304
    vision_layers: int = 27
    vision_heads: int = 16
    vision_grid: int = 27

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "MiniCPMV2Settings":
        """From a ``config.json``; what it does not name is as published."""
        return cls(**{f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None})


class MiniCPMV2(nn.Module):
    """``vpm`` (SigLIP) → ``resampler`` (queries) → ``llm``."""

    def __init__(self, config: MiniCPMV2Settings) -> None:
        super().__init__()
        self.config = config
        self.llm = GraniteForCausalLM(_language(config))
        self.llm.model.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, config.scale_emb)
        nn.init.normal_(self.llm.model.embed_tokens.weight, std=config.initializer_range)
        self.vpm = VisionTransformer(config)
        self.resampler = Resampler(config)

    def forward(self, data: Mapping[str, Any], **kwargs: Any) -> Any:
        """The language model's output over words and pictures."""
        embeddings, _ = self.get_vllm_embedding(data)
        return self.llm(inputs_embeds=embeddings, position_ids=data["position_ids"].long(), **kwargs)

    def get_vision_embedding(self, slices: list[Tensor]) -> Tensor:
        """Slices (3, height, width) of any sizes become (slices, queries, hidden)."""
        found = []
        for pixels in slices:
            grid = tuple(math.ceil(side / self.config.patch_size) for side in pixels.shape[-2:])
            found.append(self.resampler(self.vpm(pixels[None].to(self.vpm.pos_embed.dtype)), grid))
        return torch.cat(found)

    def get_vllm_embedding(self, data: Mapping[str, Any]) -> tuple[Tensor, list[Any]]:
        """Embeddings of the words, (rows, tokens, hidden), with the pictures written over their places."""
        pictures: list[Any] = [
            self.get_vision_embedding(slices) if len(slices) else [] for slices in data["pixel_values"]
        ]
        words = self.llm.model.embed_tokens(data["input_ids"])
        rows = []
        for row, seen, bounds in zip(words, pictures, data["image_bound"], strict=True):
            if len(seen) and len(bounds):
                places = torch.cat([torch.arange(int(a), int(b)) for a, b in bounds]).to(row.device)
                row = row.index_copy(0, places, seen.flatten(0, 1).to(row.dtype))
            rows.append(row)
        return torch.stack(rows), pictures

    def get_slice_image_placeholder(self, image: Any, tokenizer: Any) -> tuple[list[Any], str]:
        """The slices of a picture, and the text that they stand in for."""
        config = self.config
        slices, grid = cut(image, SliceSettings(config.max_slice_nums, config.scale_resolution, config.patch_size))
        one = IMAGE_START + UNKNOWN * config.query_num + IMAGE_END
        if grid is None:
            return slices, one
        columns, rows = grid
        return slices, one + SLICE_START + "\n".join([one * columns] * rows) + SLICE_END

    @staticmethod
    def transform(image: Any) -> Tensor:
        """Pixels from −1 to 1, (3, height, width)."""
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1)
        return pixels.permute(2, 0, 1).contiguous()


class ScaledEmbedding(nn.Embedding):
    """Embeddings times ``scale_emb``."""

    def __init__(self, count: int, width: int, scale: float) -> None:
        super().__init__(count, width)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """(..., width) of tokens (...)."""
        return super().forward(input) * self.scale


class VisionTransformer(nn.Module):
    """SigLIP's tower as timm names it, without its pooling head, for pictures of any size."""

    def __init__(self, config: MiniCPMV2Settings) -> None:
        super().__init__()
        width, self.patch = config.vision_width, config.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, self.patch, self.patch)})
        self.pos_embed = nn.Parameter(torch.randn(1, config.vision_grid**2, width) * width**-0.5)
        depth = config.vision_layers - config.drop_vision_last_layer
        self.blocks = nn.Sequential(*(Block(width, config.vision_hidden, config.vision_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """(pictures, patches, width) of (pictures, 3, height, width)."""
        height, width = pixels.shape[-2:]
        x = self.patch_embed["proj"](functional.pad(pixels, (0, -width % self.patch, 0, -height % self.patch)))
        grid = x.shape[-2:]
        return self.norm(self.blocks(x.flatten(2).transpose(1, 2) + self.positions(grid).to(x.dtype)))

    def positions(self, grid: torch.Size) -> Tensor:
        """Position embeddings, stretched to another grid: (1, patches, width)."""
        side = math.isqrt(self.pos_embed.shape[1])
        if grid == (side, side):
            return self.pos_embed
        square = self.pos_embed.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return functional.interpolate(square, tuple(grid), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Attention and a multilayer perceptron, each after its norm."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """(pictures, patches, width) to the same."""
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Resampler(nn.Module):
    """Learned queries look at the patches of one slice: its 2-d positions are sines, and stay fixed."""

    def __init__(self, config: MiniCPMV2Settings) -> None:
        super().__init__()
        width = config.hidden_size
        self.pos_embed = nn.Parameter(sines(width, (math.isqrt(config.query_num),) * 2), requires_grad=False)
        self.query = nn.Parameter(torch.randn(config.query_num, width) * 0.02)
        self.kv_proj = nn.Linear(config.vision_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // config.resampler_head)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.randn(width, width) * width**-0.5)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(1, queries, hidden) of a slice's patches, (1, patches, vision width), in a grid (rows, columns)."""
        x = self.ln_kv(self.kv_proj(patches)).transpose(0, 1)
        places = sines(self.pos_embed.shape[1], grid).to(x)[:, None]
        q = self.ln_q(self.query)[:, None] + self.pos_embed.to(x)[:, None]
        seen = self.attn(q, x + places, x, need_weights=False)[0].transpose(0, 1)
        return self.ln_post(seen) @ self.proj


def sines(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed positions of a grid (rows, columns): (cells, width), the first half for the column."""
    omega = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64).outer(omega) for n in grid)
    x = torch.cat([columns.sin(), columns.cos()], 1).expand(grid[0], -1, -1)
    y = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, grid[1], -1)
    return torch.cat([x, y], 2).flatten(0, 1).float()


def _language(config: MiniCPMV2Settings) -> GraniteConfig:
    return GraniteConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps, initializer_range=config.initializer_range, tie_word_embeddings=False,
        embedding_multiplier=1.0, residual_multiplier=config.scale_depth / math.sqrt(config.num_hidden_layers),
        attention_multiplier=(config.hidden_size // config.num_attention_heads) ** -0.5,
        logits_scaling=config.hidden_size / config.dim_model_base,
    )  # fmt: skip

"""InternVL3.5 (Wang et al. 2025, arXiv 2508.18265), 1B and 4B, in the form that transformers has natively."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForImageTextToText, GotOcr2ImageProcessorPil, InternVLConfig, PreTrainedConfig

from reproductions.paper.models.base import Batch, Encoded
from reproductions.paper.models.chat import ChatModel
from reproductions.paper.models.tiny import WIDTH, byte_tokenizer

IMAGE, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class InternVL351B(ChatModel):
    """InternViT-300M, pixels shuffled to 256 tokens a tile, a projector, Qwen3-0.6B."""

    name = "internvl3.5-1b"
    source = "OpenGVLab/InternVL3_5-1B-HF"
    # Up to twelve tiles, and the whole; a picture of 640 × 480 has twelve.
    picture = (13 * 256, 13 * 1024)
    elsewhere = ("internvl_hf", "")
    images: ClassVar = {"crop_to_patches": True}
    placeholder = IMAGE

    @classmethod
    def config(cls) -> PreTrainedConfig:
        """The published size."""
        return _config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16)

    @classmethod
    def write_tiny(cls, folder: Path, seed: int = 0) -> None:
        """Write a random network of a few ten thousand numbers."""
        torch.manual_seed(seed)
        special = {"context_image_token": IMAGE, "start_image_token": START, "end_image_token": END,
                   "turn_token": "<|im_start|>"}  # fmt: skip
        tokenizer = byte_tokenizer(special, begin=None, end="<|im_end|>", chat_template=TEMPLATE)
        text = {
            "model_type": "qwen3", "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": WIDTH,
            "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "initializer_range": 0.3, "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False,
        }  # fmt: skip
        vision = {
            "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [16, 16], "patch_size": [4, 4],
        }  # fmt: skip
        token: Any = tokenizer.convert_tokens_to_ids(IMAGE)
        config = InternVLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False,
            image_token_id=token,
        )  # fmt: skip
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = {"height": 16, "width": 16}
        GotOcr2ImageProcessorPil(size=size, min_patches=1, max_patches=2).save_pretrained(folder)

    def written(self, seen: Mapping[str, Any]) -> str:
        """The tokens of all tiles between two marks."""
        config: Any = self.network.config
        height, width = (
            int(side // patch * config.downsample_ratio)
            for side, patch in zip(config.vision_config.image_size, config.vision_config.patch_size, strict=True)
        )
        return f"{START}{IMAGE * (height * width * int(seen['num_patches'][0]))}{END}"

    def stack(self, encoded: Sequence[Encoded], shifts: Sequence[int]) -> Batch:
        """All tiles have one size."""
        network: Any = self.network
        return {"pixel_values": torch.cat([e.pictures["pixel_values"] for e in encoded]).to(network.dtype)}


class InternVL354B(InternVL351B):
    """The same around Qwen3-4B."""

    name = "internvl3.5-4b"
    source = "OpenGVLab/InternVL3_5-4B-HF"

    @classmethod
    def config(cls) -> PreTrainedConfig:
        """The published size."""
        return _config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32)


def _config(**text: int) -> PreTrainedConfig:
    more: dict[str, Any] = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
    return InternVLConfig(
        text_config={**text, **more, "tie_word_embeddings": False}, vision_config=VISION, tie_word_embeddings=False
    )

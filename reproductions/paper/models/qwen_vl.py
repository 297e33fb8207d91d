"""What Qwen2.5-VL and Qwen3-VL share: patches of any number, and positions of three axes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, Qwen2VLImageProcessorPil

from reproductions.paper.models.base import Batch, Encoded, Question
from reproductions.paper.models.chat import ChatModel
from reproductions.paper.models.tiny import WIDTH, byte_tokenizer

IMAGE, FILM, START, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROTATIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


class QwenVL(ChatModel):
    """A picture is as many tokens as its size asks for."""

    placeholder = IMAGE

    def written(self, seen: Mapping[str, Any]) -> str:
        """A token for each square of merged patches."""
        return IMAGE * (int(seen["image_grid_thw"][0].prod()) // self.pixels.merge_size**2)

    def collate(self, examples: Sequence[Question], *, answers: bool) -> Batch:
        """Positions are computed from where the picture's tokens are."""
        batch = super().collate(examples, answers=answers)
        network: Any = self.network
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == network.config.image_token_id).int()}

    def stack(self, encoded: Sequence[Encoded], shifts: Sequence[int]) -> Batch:
        """All patches one below the other."""
        network: Any = self.network
        return {
            "pixel_values": torch.cat([e.pictures["pixel_values"] for e in encoded]).to(network.dtype),
            "image_grid_thw": torch.cat([e.pictures["image_grid_thw"] for e in encoded]),
        }


def write_tiny(kind: Callable[..., PreTrainedConfig], folder: Path, seed: int, vision: Mapping[str, Any]) -> None:
    """Write a random network of a few ten thousand numbers."""
    torch.manual_seed(seed)
    special = {"image_token": IMAGE, "video_token": FILM, "vision_start": START, "vision_end": END,
               "turn_token": "<|im_start|>"}  # fmt: skip
    tokenizer = byte_tokenizer(special, begin=None, end="<|im_end|>", chat_template=TEMPLATE, pad_token="<unk>")
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3,
        "rope_parameters": ROTATIONS, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip
    shape = {
        "depth": 2, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": WIDTH, **vision,
    }  # fmt: skip
    config = kind(
        text_config=text, vision_config=shape, image_token_id=ids["image_token"], video_token_id=ids["video_token"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"], tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 256}
    Qwen2VLImageProcessorPil(size=size, patch_size=4, merge_size=2, temporal_patch_size=2).save_pretrained(folder)

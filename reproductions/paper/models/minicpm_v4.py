"""MiniCPM-V 4.6, native in transformers: the stand-in for MiniCPM-V-2.0 where a present-day model will do.

Its processor needs torchvision for films; pictures need the image processor and the tokenizer alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    MiniCPMV4_6ImageProcessorPil,
)

from reproductions.paper.models.base import Batch, Encoded, VisionLanguageModel, image_processor, read_weights
from reproductions.paper.models.tiny import WIDTH, byte_tokenizer

IMAGE, FILM = "<|image_pad|>", "<|video_pad|>"
MARKS = {
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image_pad|>\n{% else %}{{ part.text }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class MiniCPMV4Model(VisionLanguageModel):
    """MiniCPM-V 4.6: SigLIP, a merger, Qwen3.5."""

    name = "minicpm-v-4.6"
    source = "openbmb/MiniCPM-V-4.6"
    picture = (5 * 64, 5 * 1024)
    placeholder = IMAGE

    def __init__(self, network: nn.Module, tokenizer: Any, pixels: Any) -> None:
        super().__init__(network, tokenizer)
        self.pixels = pixels
        config: Any = network.config
        self.image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        # Two merges of 2 × 2 patches each; the mode "4x" leaves out the first.
        self.patches_a_token = 4 if config.downsample_mode == "4x" else 16

    @classmethod
    def skeleton(cls) -> nn.Module:
        """The network on the meta device, in the size that transformers' configuration has by default."""
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(AutoConfig.for_model("minicpmv4_6"))

    @classmethod
    def load(cls, source: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> "MiniCPMV4Model":
        """Read weights and tokenizer from a folder or from the hub; none of their code is needed."""
        network = read_weights(AutoModelForImageTextToText, source, dtype)
        return cls(network, AutoTokenizer.from_pretrained(source), image_processor(source))

    @classmethod
    def write_tiny(cls, folder: Path, seed: int = 0) -> None:
        """Write a random network of a few ten thousand numbers."""
        torch.manual_seed(seed)
        special = {"image_token": IMAGE, "video_token": FILM, **MARKS, "turn_token": "<|im_start|>"}
        tokenizer = byte_tokenizer(special, begin=None, chat_template=TEMPLATE)
        image, film = (tokenizer.convert_tokens_to_ids(token) for token in (IMAGE, FILM))
        text = {
            "model_type": "qwen3_5_text", "vocab_size": len(tokenizer), "hidden_size": WIDTH,
            "intermediate_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 8, "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2,
            "linear_num_value_heads": 2, "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.3,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2], "mrope_interleaved": True,
                "partial_rotary_factor": 1.0,
            },
        }  # fmt: skip
        vision = {
            "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 4,
        }  # fmt: skip
        config = AutoConfig.for_model(
            "minicpmv4_6", text_config=text, vision_config=vision, insert_layer_id=0, image_token_id=image,
            video_token_id=film,
        )  # fmt: skip
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        MiniCPMV4_6ImageProcessorPil(max_slice_nums=2, scale_resolution=32, patch_size=4).save_pretrained(folder)

    def encode(self, image: Any, question: str) -> Encoded:
        """One picture, cut into slices, and one instruction."""
        seen = self.pixels(images=[image.convert("RGB")], return_tensors="pt")
        counts = (seen["target_sizes"].prod(-1) // self.patches_a_token).tolist()
        rows, columns = seen["grids"][0]
        placeholder = self._marked("0", "image_id") * self.pixels.use_image_id
        placeholder += self._marked(self.image_token * counts[0], "image")
        for row in range(rows):
            parts = counts[1 + row * columns : 1 + (row + 1) * columns]
            placeholder += "\n" if row else ""
            placeholder += "".join(self._marked(self.image_token * count, "slice") for count in parts)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}], tokenize=False,
            add_generation_prompt=True, enable_thinking=False,
        ).replace(self.image_token, placeholder, 1)  # fmt: skip
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Encoded(tokens, {name: seen[name] for name in ("pixel_values", "target_sizes")})

    def stack(self, encoded: Sequence[Encoded], shifts: Sequence[int]) -> Batch:
        """All patches in one row, one slice after the other."""
        network: Any = self.network
        return {
            "pixel_values": torch.cat([e.pictures["pixel_values"] for e in encoded], -1).to(network.dtype),
            "target_sizes": torch.cat([e.pictures["target_sizes"] for e in encoded]),
        }

    def _marked(self, text: str, kind: str) -> str:
        start, end = (getattr(self.tokenizer, f"{kind}_{side}_token") for side in ("start", "end"))
        return f"{start}{text}{end}"

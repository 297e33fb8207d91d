"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923), 3B and 7B, native in transformers."""

from pathlib import Path

from transformers import PreTrainedConfig, Qwen2_5_VLConfig

from reproductions.paper.models.qwen_vl import QwenVL, write_tiny

VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}


class Qwen25VL3B(QwenVL):
    """A vision transformer with windows, a merger of 2 × 2 patches, Qwen2.5-3B."""

    name = "qwen2.5-vl-3b"
    source = "Qwen/Qwen2.5-VL-3B-Instruct"
    picture = (391, 4 * 391)
    elsewhere = ("qwen2_5_vl", "Qwen2VLChat")

    @classmethod
    def config(cls) -> PreTrainedConfig:
        """The published size."""
        text = {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2,
        }  # fmt: skip
        return Qwen2_5_VLConfig(
            text_config=text, vision_config={**VISION, "out_hidden_size": 2048}, tie_word_embeddings=True
        )

    @classmethod
    def write_tiny(cls, folder: Path, seed: int = 0) -> None:
        """Write a random network of a few ten thousand numbers."""
        write_tiny(Qwen2_5_VLConfig, folder, seed, {"window_size": 16, "fullatt_block_indexes": [1]})


class Qwen25VL7B(Qwen25VL3B):
    """The same around Qwen2.5-7B."""

    name = "qwen2.5-vl-7b"
    source = "Qwen/Qwen2.5-VL-7B-Instruct"

    @classmethod
    def config(cls) -> PreTrainedConfig:
        """The published size."""
        text = {
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4,
        }  # fmt: skip
        return Qwen2_5_VLConfig(
            text_config=text, vision_config={**VISION, "out_hidden_size": 3584}, tie_word_embeddings=False
        )

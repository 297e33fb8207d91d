"""Qwen3-VL (Bai et al. 2025, arXiv 2511.21631), 2B and 4B, native in transformers."""

from pathlib import Path

from transformers import PreTrainedConfig, Qwen3VLConfig

from reproductions.paper.models.qwen_vl import QwenVL, write_tiny

VISION = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
    "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip


class Qwen3VL2B(QwenVL):
    """SigLIP-2-L, a merger of 2 × 2 patches and three more into the first decoder layers, Qwen3-1.7B."""

    name = "qwen3-vl-2b"
    source = "Qwen/Qwen3-VL-2B-Instruct"
    picture = (300, 4 * 300)
    elsewhere = ("qwen3_vl", "Qwen3VLChat")

    @classmethod
    def config(cls) -> PreTrainedConfig:
        """The published size."""
        return _config(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16)

    @classmethod
    def write_tiny(cls, folder: Path, seed: int = 0) -> None:
        """Write a random network of a few ten thousand numbers."""
        write_tiny(Qwen3VLConfig, folder, seed, {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]})


class Qwen3VL4B(Qwen3VL2B):
    """The same around Qwen3-4B."""

    name = "qwen3-vl-4b"
    source = "Qwen/Qwen3-VL-4B-Instruct"

    @classmethod
    def config(cls) -> PreTrainedConfig:
        """The published size."""
        return _config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32)


def _config(hidden_size: int, **text: int) -> PreTrainedConfig:
    text |= {"vocab_size": 151936, "hidden_size": hidden_size, "num_key_value_heads": 8, "head_dim": 128}
    vision = {**VISION, "out_hidden_size": hidden_size}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)

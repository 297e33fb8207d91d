"""SmolVLM2-2.2B (Marafioti et al. 2025, arXiv 2504.05299), native in transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, SmolVLMConfig, SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from reproductions.paper.models.base import Batch, Encoded
from reproductions.paper.models.chat import ChatModel
from reproductions.paper.models.tiny import WIDTH, byte_tokenizer

IMAGE, AROUND, WHOLE, END = "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content[0].type == 'image' %}:{% else %}: {% endif %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class SmolVLM2(ChatModel):
    """SigLIP-400M, 81 tokens a tile, SmolLM2-1.7B."""

    name = "smolvlm2-2.2b"
    source = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
    # Four by three tiles, and the whole.
    picture = (13 * 81, 13 * 729)
    elsewhere = ("", "SmolVLM2")
    images: ClassVar = {"return_row_col_info": True}
    placeholder = IMAGE

    @classmethod
    def config(cls) -> PreTrainedConfig:
        """The published size."""
        text = {
            "model_type": "llama", "vocab_size": 49280, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
        }  # fmt: skip
        vision = {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "patch_size": 14, "image_size": 384,
        }  # fmt: skip
        return SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=3, tie_word_embeddings=False)

    @classmethod
    def write_tiny(cls, folder: Path, seed: int = 0) -> None:
        """Write a random network of a few ten thousand numbers."""
        torch.manual_seed(seed)
        places = {f"row_{r}_col_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)}
        special = {"image_token": IMAGE, "fake_image_token": AROUND, "global_image_token": WHOLE, **places,
                   "turn_token": "<|im_start|>"}  # fmt: skip
        tokenizer = byte_tokenizer(special, begin=None, end=END, chat_template=TEMPLATE)
        text = {
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": WIDTH,
            "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3,
            "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False,
        }  # fmt: skip
        vision = {
            "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        }  # fmt: skip
        token: Any = tokenizer.convert_tokens_to_ids(IMAGE)
        config = SmolVLMConfig(
            text_config=text, vision_config=vision, scale_factor=2, tie_word_embeddings=False,
            image_token_id=token,
        )  # fmt: skip
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}).save_pretrained(folder)

    def written(self, seen: Mapping[str, Any]) -> str:
        """Tiles by row and column, and the whole; or the whole alone."""
        config: Any = self.network.config
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        rows, columns = seen["rows"][0][0], seen["cols"][0][0]
        text: str = get_image_prompt_string(int(rows), int(columns), side**2, AROUND, IMAGE, WHOLE)
        return text

    def stack(self, encoded: Sequence[Encoded], shifts: Sequence[int]) -> Batch:
        """As many tiles for each row as the most has; those of zeros are passed over by the network."""
        network: Any = self.network
        most = max(e.pictures["pixel_values"].shape[1] for e in encoded)

        def filled(name: str) -> torch.Tensor:
            parts = [e.pictures[name][0] for e in encoded]
            return torch.stack([torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in parts])

        return {
            "pixel_values": filled("pixel_values").to(network.dtype),
            "pixel_attention_mask": filled("pixel_attention_mask"),
        }

"""LLaVA-1.5-7B, native in transformers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from reproductions.paper.models.base import Batch, Encoded, VisionLanguageModel, image_processor, read_weights
from reproductions.paper.models.tiny import WIDTH, byte_tokenizer

TOKEN = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PROMPT = SYSTEM + " USER: {image}\n{question} ASSISTANT:"
"""The instruction as the model was taught, and as its published scores were measured: LLaVA's form "vicuna_v1"."""
TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""What the published chat template writes, which has no system sentence."""


class Llava(VisionLanguageModel):
    """LLaVA-1.5: CLIP at 336 pixels, a projector of two layers, Vicuna-7B."""

    name = "llava-1.5-7b"
    source = "llava-hf/llava-1.5-7b-hf"
    picture = (576, 577)
    elsewhere = ("llava_hf", "")
    placeholder = TOKEN

    def __init__(self, network: nn.Module, tokenizer: Any, pixels: Any) -> None:
        super().__init__(network, tokenizer)
        self.pixels = pixels
        config: Any = network.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        # The strategy "default" leaves out the class token, "full" keeps it.
        self.image_tokens = side**2 + (config.vision_feature_select_strategy == "full")

    @classmethod
    def skeleton(cls) -> nn.Module:
        """The network in its published size on the meta device."""
        vision = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        )  # fmt: skip
        text = LlamaConfig(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            tie_word_embeddings=False,
        )  # fmt: skip
        with torch.device("meta"):
            return LlavaForConditionalGeneration(
                LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000)
            )

    @classmethod
    def load(cls, source: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> "Llava":
        """Read weights and tokenizer from a folder or from the hub; none of their code is needed."""
        network = read_weights(LlavaForConditionalGeneration, source, dtype)
        return cls(network, AutoTokenizer.from_pretrained(source), image_processor(source))

    @classmethod
    def write_tiny(cls, folder: Path, seed: int = 0) -> None:
        """Write a random LLaVA of a few ten thousand numbers."""
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer({"image_token": TOKEN}, chat_template=TEMPLATE)
        vision = CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8, projection_dim=WIDTH,
        )  # fmt: skip
        text = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3,
            num_attention_heads=2, tie_word_embeddings=False, initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        token: Any = tokenizer.convert_tokens_to_ids(TOKEN)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=token)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
        name_as_published(folder / "model.safetensors")
        tokenizer.save_pretrained(folder)
        square = {"height": 16, "width": 16}
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square).save_pretrained(folder)
        # Without it other programs do not know how many tokens a picture is.
        processor = {
            "processor_class": "LlavaProcessor", "image_token": TOKEN, "patch_size": 8,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
        }  # fmt: skip
        (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))

    def encode(self, image: Any, question: str) -> Encoded:
        """One picture and one instruction."""
        text = PROMPT.format(image=TOKEN * self.image_tokens, question=question)
        pixels = self.pixels(images=self._square(image.convert("RGB")), return_tensors="pt")["pixel_values"]
        return Encoded(self.tokenizer(text)["input_ids"], {"pixel_values": pixels})

    def _square(self, image: Any) -> Any:
        """The whole picture on a square of the mean colour, as LLaVA-1.5 was taught and its published scores were
        measured; the image processor on the hub crops the longer sides away."""
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * x) for x in self.pixels.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def stack(self, encoded: Sequence[Encoded], shifts: Sequence[int]) -> Batch:
        """All pictures have one size."""
        network: Any = self.network
        return {"pixel_values": torch.cat([e.pictures["pixel_values"] for e in encoded]).to(network.dtype)}


def name_as_published(file: Path) -> None:
    """Name the vision tower's weights as the published file does; transformers leaves out a part of what it made up."""
    own, published = "vision_tower.", "vision_tower.vision_model."
    weights = {name.replace(own, published): x for name, x in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})

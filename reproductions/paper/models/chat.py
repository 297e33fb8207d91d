"""Models of transformers whose instruction is their own chat template, and whose pictures their own image processor's.

Their processors need torchvision for films; pictures need the image processor and the tokenizer alone.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig
from transformers.utils.hub import cached_file

from reproductions.paper.models.base import Encoded, ModelError, VisionLanguageModel, image_processor, read_weights

TEMPLATES = ("chat_template.jinja", "chat_template.json")
"""Files of a processor's chat template, of new releases and of old ones."""


class ChatModel(VisionLanguageModel):
    """A family is a file with a subclass; each size of it is a subclass of that one.

    Attributes:
        images: keywords of the image processor that the family's processor passes.
        placeholder: what the chat template writes for a picture.
    """

    images: ClassVar[Mapping[str, Any]] = {}
    placeholder: ClassVar[str]

    def __init__(self, network: nn.Module, tokenizer: Any, pixels: Any, template: str | None = None) -> None:
        super().__init__(network, tokenizer)
        self.pixels, self.template = pixels, template
        asked, answered = self._told("?"), self._told("?", "!")
        if not answered.startswith(asked):
            raise ModelError(f"{self.name}: its chat template writes another question once it is answered")
        # Such as a blank; the end is the tokenizer's.
        self.before_answer = answered.removeprefix(asked).partition("!")[0]

    @classmethod
    @abstractmethod
    def config(cls) -> PreTrainedConfig:
        """The published size."""

    @classmethod
    def skeleton(cls) -> nn.Module:
        """The network in its published size on the meta device."""
        with torch.device("meta"):
            network: nn.Module = AutoModelForImageTextToText.from_config(cls.config())
        return network

    @classmethod
    def load(cls, source: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> "ChatModel":
        """Read weights, tokenizer, image processor and chat template from a folder or from the hub."""
        network = read_weights(AutoModelForImageTextToText, source, dtype)
        tokenizer, pixels = AutoTokenizer.from_pretrained(source), image_processor(source)
        return cls(network, tokenizer, pixels, chat_template(source))

    @abstractmethod
    def written(self, seen: Mapping[str, Any]) -> str:
        """The text that stands for a picture, from what the image processor made of it."""

    def encode(self, image: Any, question: str) -> Encoded:
        """One picture and one instruction."""
        seen = self.pixels(images=[image.convert("RGB")], return_tensors="pt", **self.images)
        text = self._told(question).replace(self.placeholder, self.written(seen), 1)
        return Encoded(self.tokenizer(text, add_special_tokens=False)["input_ids"], dict(seen))

    def answer_tokens(self, target: str) -> list[int]:
        """An answer as the chat template puts it behind its question, and the token that ends it."""
        return super().answer_tokens(self.before_answer + target)

    def _told(self, question: str, answer: str | None = None) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text: str = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=answer is None
        )
        if self.placeholder not in text:
            raise ModelError(f"{self.name}: its chat template does not write {self.placeholder} for a picture")
        return text


def chat_template(source: str | Path) -> str | None:
    """The template of a model's processor; None where it has none but its tokenizer's."""
    for name in TEMPLATES:
        path = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if path is not None:
            text = Path(path).read_text(encoding="utf-8")
            return str(json.loads(text)["chat_template"]) if name.endswith(".json") else text
    return None

"""One interface to the vision-language models: examples in, batches, features and answers out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from torch_mdgd import VisualTap

IGNORED = -100
"""The label of what is not to be learned: instructions, pictures and padding."""

Batch = dict[str, Any]
FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py")
"""What is fetched of a repository on the hub: weights in one of several forms, and what belongs to them."""


class ModelError(ValueError):
    """Weights that cannot be had or do not fit; the message names where they were looked for."""


class Question(Protocol):
    """What a model needs of an example."""

    @property
    def image(self) -> Any:
        """A picture of PIL."""

    @property
    def question(self) -> str:
        """The instruction, without a chat template."""

    @property
    def target(self) -> str:
        """What training teaches to answer."""


@dataclass(frozen=True)
class Encoded:
    """An instruction as a model reads it: its tokens, image tokens included, and its pictures."""

    tokens: list[int]
    pictures: dict[str, Any]


class VisionLanguageModel(ABC):
    """A network and its tokenizer; each family is a subclass.

    Attributes:
        name: what configurations call the family.
        source: where its published weights are.
        picture: tokens of a common picture, 640 × 480, for the decoder, and patches for the vision tower.
        elsewhere: what lmms-eval calls its model, and the class of VLMEvalKit, that load a folder of this family; empty
            where there is none.
        placeholder: what stands for a picture in a text, where a question that holds it would be taken for one.
        tiles_in_turn: whether the vision tower looks at one tile after the other, so that the last alone is remembered
            from one pass over the same batch to the next.
        network: called as ``network(**batch)``; its output has ``loss`` where the batch has labels.
        tokenizer: of transformers.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    picture: ClassVar[tuple[int, int]]
    elsewhere: ClassVar[tuple[str, str]] = ("", "")
    placeholder: ClassVar[str] = ""
    tiles_in_turn: ClassVar[bool] = False

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        self.network = network
        self.tokenizer = tokenizer

    @classmethod
    @abstractmethod
    def skeleton(cls) -> nn.Module:
        """The network in its published size on the meta device: shapes without numbers."""

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> "VisionLanguageModel":
        """Read weights and tokenizer from a folder or from the hub."""

    @classmethod
    @abstractmethod
    def write_tiny(cls, folder: Path, seed: int = 0) -> None:
        """Write a random network of the same architecture, a few ten thousand numbers, in the published format."""

    @abstractmethod
    def encode(self, image: Any, question: str) -> Encoded:
        """One picture and one instruction, up to where the answer begins."""

    @abstractmethod
    def stack(self, encoded: Sequence[Encoded], shifts: Sequence[int]) -> Batch:
        """The pictures of a batch as the network takes them; each row's tokens begin after its shift of padding."""

    def tap(self) -> VisualTap:
        """Where the visual features are."""
        return VisualTap.for_model(self.network)

    def collate(self, examples: Sequence[Question], *, answers: bool) -> Batch:
        """A batch on the CPU.

        Args:
            examples: at least one.
            answers: append each example's target, and learn it; padding is then on the right. Without, it is on the
                left, so that answers can be generated.
        """
        encoded = [self.encode(example.image, self.in_words(example.question)) for example in examples]
        rows = [e.tokens for e in encoded]
        targets = [self.answer_tokens(self.in_words(example.target)) if answers else [] for example in examples]
        longest = max(len(row) + len(target) for row, target in zip(rows, targets, strict=True))
        ids = torch.full((len(rows), longest), self.padding)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        shifts = []
        for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
            whole = torch.tensor(row + target)
            shift = 0 if answers else longest - len(whole)
            here = slice(shift, shift + len(whole))
            ids[i, here], mask[i, here] = whole, 1
            labels[i, shift + len(row) : shift + len(whole)] = whole[len(row) :]
            shifts.append(shift)
        batch = {"input_ids": ids, "attention_mask": mask, **self.stack(encoded, shifts)}
        return {**batch, "labels": labels} if answers else batch

    def in_words(self, text: str) -> str:
        """A text without the placeholder, of which the network would ask for another picture."""
        token = self.placeholder
        return text.replace(token, f"{token[0]} {token[1:]}") if token else text

    def answer_tokens(self, target: str) -> list[int]:
        """An answer and the token that ends it."""
        return [*self.tokenizer(target, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    @property
    def padding(self) -> int:
        """The token of padding: any will do, it is masked."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @torch.no_grad()
    def generate(
        self, batch: Mapping[str, Any], max_new_tokens: int, *, beams: int = 1, repetition_penalty: float = 1.0
    ) -> list[str]:
        """Answers to a batch without labels, greedily by default, whatever settings came with the weights."""
        network: Any = self.network
        generated = network.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=beams,
            repetition_penalty=repetition_penalty, pad_token_id=self.padding, eos_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        words = generated[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(words, skip_special_tokens=True)]

    def to(self, device: torch.device) -> "VisionLanguageModel":
        """Move the network."""
        self.network.to(device)
        return self


def image_processor(source: str | Path) -> Any:
    """The image processor of a folder or of the hub, by Pillow.

    That by torchvision, which transformers takes where it is installed, resizes to other pixels.
    """
    return AutoImageProcessor.from_pretrained(source, backend="pil")


def read_weights(kind: Any, source: str | Path, dtype: torch.dtype) -> Any:
    """A network of transformers with all its weights from a folder or from the hub.

    Raises:
        ModelError: a weight is missing or of another shape, naming one: transformers makes up random ones.
    """
    network, info = kind.from_pretrained(source, dtype=dtype, output_loading_info=True)
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise ModelError(f"{source} does not hold the weights of {type(network).__name__}: it lacks {lacking[0]}")
    return network


def to_device(value: Any, device: torch.device) -> Any:
    """A batch, with its lists of pictures, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: to_device(x, device) for name, x in value.items()}
    return [to_device(x, device) for x in value] if isinstance(value, list) else value

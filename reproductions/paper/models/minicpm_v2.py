"""MiniCPM-V-2.0: an adapter from its forward, which knows no labels, to the form of transformers' own models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from reproductions.paper.models.base import FILES, Batch, Encoded, ModelError, VisionLanguageModel
from reproductions.paper.models.minicpm_v2_network import (
    IMAGE_END,
    IMAGE_START,
    SLICE_END,
    SLICE_START,
    MiniCPMV2,
    MiniCPMV2Settings,
)
from reproductions.paper.models.tiny import WIDTH, byte_tokenizer
from torch_mdgd import VisualTap

PROMPT = "<用户>{picture}\n{question}<AI>"
MARKS = {"im_start": IMAGE_START, "im_end": IMAGE_END, "slice_start": SLICE_START, "slice_end": SLICE_END}


class Adapter(nn.Module):
    """A network with the interface of MiniCPM-V-2.0, as one that is called with ``**batch``.

    Args:
        model: called as ``model(data, **kwargs)`` and returning ``logits``; it has ``llm``, ``resampler`` and
            ``get_vllm_embedding(data)``.
        shifted_labels: whether ``labels`` of a batch hold the *next* token at each place, as the data that the model
            was published with do; by default they hold the token itself, as everywhere in transformers.
    """

    def __init__(self, model: nn.Module, *, shifted_labels: bool = False) -> None:
        super().__init__()
        language: Any = model.llm
        self.model: Any = model
        self.shifted_labels = shifted_labels
        self.config = language.config

    def get_decoder(self) -> nn.Module:
        """The text decoder, whose output is after the final norm."""
        return self.model.llm.model

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Sequence[Sequence[Tensor]],
        image_bound: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, (rows, tokens, vocabulary), and the loss where there are labels.

        Args:
            input_ids: (rows, tokens).
            pixel_values: for each row its slices, (3, height, width).
            image_bound: for each row (slices, 2): where each slice's queries begin, and where they have ended.
            attention_mask: (rows, tokens), 0 at padding on either side.
            labels: (rows, tokens), -100 where nothing is learned.
            **kwargs: ``num_items_in_batch`` for the loss.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        data = {
            "input_ids": input_ids,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "pixel_values": pixel_values,
            "image_bound": image_bound,
        }
        logits = self.model(data, attention_mask=mask, use_cache=False).logits
        loss = None
        if labels is not None:
            shifted = labels if self.shifted_labels else None
            loss = ForCausalLMLoss(logits, labels, logits.shape[-1], shift_labels=shifted, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """The tokens that were given, and those that follow."""
        pictures = {name: kwargs.pop(name) for name in ("pixel_values", "image_bound")}
        embeddings, _ = self.model.get_vllm_embedding({"input_ids": input_ids, **pictures})
        generated = self.model.llm.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)
        return torch.cat([input_ids, generated], 1)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Of the language model, where nearly all activations are."""
        self.model.llm.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """No longer."""
        self.model.llm.gradient_checkpointing_disable()


class MiniCPMV2Model(VisionLanguageModel):
    """MiniCPM-V-2.0: SigLIP-400M, a resampler of 64 queries, MiniCPM-2.4B."""

    name = "minicpm-v-2"
    source = "openbmb/MiniCPM-V-2"
    # An overview and up to nine slices; four is what 0.8 megapixels are cut into.
    picture = (5 * 64, 5 * 1024)
    tiles_in_turn = True
    elsewhere = ("minicpm_v", "MiniCPM_V")

    @classmethod
    def skeleton(cls) -> nn.Module:
        """The network in its published size on the meta device."""
        with torch.device("meta"):
            return Adapter(MiniCPMV2(MiniCPMV2Settings()))

    @classmethod
    def load(cls, source: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> "MiniCPMV2Model":
        """Read weights and tokenizer from a folder or from the hub.

        Args:
            source: where.
            dtype: of the weights.
            trust_remote_code: run the code that lies beside the weights in place of this repository's.

        Raises:
            ModelError: the weights do not fit this repository's network, naming one; or their own code does not run
                under this release of transformers.
        """
        folder = _folder(source)
        if trust_remote_code:
            try:
                remote = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
            except (ImportError, AttributeError, TypeError) as error:
                raise ModelError(
                    f"{source}: its own code does not run under this release of transformers ({error}); leave out "
                    "--trust-remote-code to use this repository's implementation of it"
                ) from error
            return cls(Adapter(remote), _tokenizer(folder))
        settings = MiniCPMV2Settings.read(json.loads((folder / "config.json").read_text()))
        with torch.device("meta"):
            network = MiniCPMV2(settings)
        _load_weights(network, folder, dtype)
        return cls(Adapter(network), _tokenizer(folder))

    @classmethod
    def write_tiny(cls, folder: Path, seed: int = 0) -> None:
        """Write a random network of a few ten thousand numbers."""
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer(MARKS)
        settings = MiniCPMV2Settings(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=2, dim_model_base=WIDTH // 2, query_num=4, resampler_head=8,
            patch_size=8, max_slice_nums=2, scale_resolution=24, vision_width=WIDTH, vision_hidden=WIDTH,
            vision_layers=2, vision_heads=2, vision_grid=3, initializer_range=0.3,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        save_file(MiniCPMV2(settings).state_dict(), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(asdict(settings), indent=1))
        tokenizer.save_pretrained(folder)

    def tap(self) -> VisualTap:
        """Image tokens are where slices were written, whatever tokens stand there."""
        adapter: Any = self.network
        return VisualTap(adapter.get_decoder(), image_tokens)

    def encode(self, image: Any, question: str) -> Encoded:
        """One picture, cut into slices, and one instruction."""
        model: Any = self.network.model
        slices, placeholder = model.get_slice_image_placeholder(image.convert("RGB"), self.tokenizer)
        tokens = self.tokenizer(PROMPT.format(picture=placeholder, question=question))["input_ids"]
        if tokens[0] != self.tokenizer.bos_token_id:
            tokens = [self.tokenizer.bos_token_id, *tokens]
        pixels = [model.transform(part) for part in slices]
        return Encoded(tokens, {"pixel_values": pixels, "image_bound": self._bounds(tokens, len(pixels))})

    def stack(self, encoded: Sequence[Encoded], shifts: Sequence[int]) -> Batch:
        """Slices keep their own sizes, so that they stay lists."""
        return {
            "pixel_values": [e.pictures["pixel_values"] for e in encoded],
            "image_bound": [e.pictures["image_bound"] + shift for e, shift in zip(encoded, shifts, strict=True)],
        }

    def _bounds(self, tokens: list[int], slices: int) -> Tensor:
        start, end = self.tokenizer.convert_tokens_to_ids([IMAGE_START, IMAGE_END])
        # A question may name these tokens too; the pictures come before it.
        starts = [i + 1 for i, token in enumerate(tokens) if token == start][:slices]
        ends = [i for i, token in enumerate(tokens) if token == end][:slices]
        if len(starts) != slices or any(end - start != self.queries for start, end in zip(starts, ends, strict=True)):
            raise ModelError(
                f"{self.name}: the tokenizer does not keep {IMAGE_START}, {IMAGE_END} and {self.queries} times "
                f"{self.tokenizer.unk_token} between them whole, so pictures have no place to go"
            )
        return torch.tensor([starts, ends]).T

    @property
    def queries(self) -> int:
        """Tokens of a slice."""
        model: Any = self.network.model
        return int(model.config.query_num)


def image_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Bool, (rows, tokens): true within ``image_bound``."""
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, bounds in enumerate(batch["image_bound"]):
        for begin, end in bounds.tolist():
            mask[row, begin:end] = True
    return mask


def _folder(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), allow_patterns=list(FILES)))


def _tokenizer(folder: Path) -> Any:
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else LlamaTokenizer
    tokenizer = kind.from_pretrained(folder)
    # Names that its own code knows them by.
    for name, token in MARKS.items():
        setattr(tokenizer, name, token)
    return tokenizer


def _load_weights(network: MiniCPMV2, folder: Path, dtype: torch.dtype) -> None:
    """Give a network on the meta device its numbers."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no weights (*.safetensors)")
    wanted = {name: x.shape for name, x in network.state_dict().items()}
    for file in files:
        weights = {name: x.to(dtype) for name, x in load_file(file).items()}
        for name, x in weights.items():
            if wanted.pop(name, None) != x.shape:
                raise ModelError(f"{file}: {name} {tuple(x.shape)} is no weight of MiniCPM-V-2.0 as implemented here")
        network.load_state_dict(weights, strict=False, assign=True)
    if wanted:
        raise ModelError(f"{folder} does not hold the weights of MiniCPM-V-2.0: it lacks {min(wanted)}")
    # What no file holds: the frequencies of rotary positions.
    rotary: Any = type(network.llm.model.rotary_emb)
    network.llm.model.rotary_emb = rotary(network.llm.config)

"""The features whose loss is visual forgetting: last hidden states at the image tokens, and their alignment (5)."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]
# What configurations of transformers call the token that stands for a piece of a picture or of a film.
TOKEN_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


class VisualTap:
    """Runs a model and takes the last hidden states at its image tokens, z.

    Nothing stays on the model: the hook lives for one call. The text module's output is what
    ``output_hidden_states`` would return last, after the final norm.

    Args:
        text_module: the decoder whose output is tapped: a tensor of shape (batch, tokens, hidden), or an output whose
            first element is one.
        mask: maps a batch to a bool tensor of shape (batch, tokens), true at image tokens.
    """

    def __init__(self, text_module: nn.Module, mask: Callable[[Batch], Tensor]) -> None:
        self.text_module = text_module
        self.mask = mask

    @classmethod
    def for_model(cls, model: nn.Module) -> "VisualTap":
        """The tap of a vision-language model of transformers whose image tokens stand in its text sequence.

        Args:
            model: the model, also inside DistributedDataParallel or a PeftModel.

        Raises:
            TypeError: not a model of transformers.
            ValueError: a family without image tokens in its sequence; name the text module and a mask yourself.
        """
        inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        config = getattr(inner, "config", None)
        if config is None or not hasattr(inner, "get_decoder"):
            raise TypeError(
                f"VisualTap.for_model: {type(model).__name__} is not a model of transformers; build "
                "VisualTap(text_module, mask) from its decoder and a function that marks image tokens"
            )
        if getattr(config, "model_type", None) == "mllama":
            raise ValueError("VisualTap: Mllama attends to pictures from outside its token sequence: no image tokens")
        ids = [getattr(config, name) for name in TOKEN_NAMES if isinstance(getattr(config, name, None), int)]
        if not ids:
            raise ValueError(
                f"VisualTap: the configuration of {type(inner).__name__} names no image token; build "
                "VisualTap(text_module, mask) from its decoder and a function that marks image tokens"
            )
        return cls(inner.get_decoder(), lambda batch: _is_one_of(batch, ids))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
        """Run ``model(**batch)``.

        Returns:
            the model's output, and z of shape (image tokens in the batch, hidden) with its graph.

        Raises:
            RuntimeError: the text module was not run.
            ValueError: the mask does not fit the hidden states.
        """
        seen: list[Tensor] = []
        handle = self.text_module.register_forward_hook(
            lambda module, args, output: seen.append(output if isinstance(output, Tensor) else output[0])
        )
        try:
            output = model(**batch)
        finally:
            handle.remove()
        if not seen:
            raise RuntimeError(f"VisualTap: the model did not run its text module {type(self.text_module).__name__}")
        hidden, mask = seen[-1], self.mask(batch)
        if mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"VisualTap: the mask has shape {tuple(mask.shape)}, the hidden states {tuple(hidden.shape)}: the "
                "model changed the sequence, so its image tokens need a mask function of their own"
            )
        return output, hidden[mask.to(hidden.device)]


def visual_alignment_loss(z: Tensor, z_ref: Tensor, kind: Literal["l1", "mse"] = "l1") -> Tensor:
    """(5) L_v, the mean over tokens and channels of |z − z_ref|, or of its square; 0 for no tokens.

    Args:
        z: features, shape (tokens, hidden), any floating dtype; the difference is taken in float32.
        z_ref: features of the same tokens with other weights.
        kind: "l1" as published, or "mse".

    Returns:
        float32 scalar.

    Raises:
        ValueError: the shapes differ, or an unknown kind.
    """
    if z.shape != z_ref.shape:
        raise ValueError(f"visual_alignment_loss: z has shape {tuple(z.shape)}, z_ref {tuple(z_ref.shape)}")
    if kind not in ("l1", "mse"):
        raise ValueError(f"visual_alignment_loss: kind must be 'l1' or 'mse', got {kind!r}")
    if z.numel() == 0:
        return z.sum().float()
    difference = z.float() - z_ref.float()
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


def _is_one_of(batch: Batch, ids: list[int]) -> Tensor:
    if "input_ids" not in batch:
        raise ValueError(f"VisualTap: the batch has no 'input_ids' to find image tokens in, only {sorted(batch)}")
    tokens: Tensor = batch["input_ids"]
    return torch.isin(tokens, torch.tensor(ids, device=tokens.device))

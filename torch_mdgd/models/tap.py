"""The features whose loss is visual forgetting: hidden states at the image tokens, and their alignment (5)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_mdgd.models.families import TOKENS, WITHOUT_IMAGE_TOKENS
from torch_mdgd.models.parts import decoder_layers, text_decoder, unwrap

Batch = Mapping[str, Any]
BUILD_IT = "build VisualTap(text_module, mask) yourself, from a module and a function that marks image tokens"


class VisualTap:
    """Runs a model and takes hidden states at its image tokens, z.

    Nothing stays on the model: the hooks live for one call. Layers count as in ``output_hidden_states``: 0 is what
    enters the first decoder layer, i the output of the i-th, and the last is the text module's output, after the
    final norm.

    Args:
        text_module: the decoder that is tapped; its output is a tensor of shape (batch, tokens, hidden), or one whose
            first element is. For layers other than -1 it needs a ``ModuleList`` called ``layers``.
        mask: maps a batch to a bool tensor of shape (batch, tokens), true at image tokens.
        layers: one layer or several, negative from the end; -1 is the one of (5). With several, z holds the tokens of
            the first, then those of the second, ..., so that a mean over z is the mean over the layers.

    Raises:
        ValueError: no such layer.
    """

    def __init__(
        self, text_module: nn.Module, mask: Callable[[Batch], Tensor], layers: int | Sequence[int] = -1
    ) -> None:
        self.text_module = text_module
        self.mask = mask
        self.layers = (layers,) if isinstance(layers, int) else tuple(layers)
        if not self.layers:
            raise ValueError("VisualTap: layers is empty; name at least one, such as -1")
        self._places = [_place(text_module, layer) for layer in self.layers]

    @classmethod
    def for_model(cls, model: nn.Module, layers: int | Sequence[int] = -1) -> "VisualTap":
        """The tap of a vision-language model of transformers whose image tokens stand in its text sequence.

        Args:
            model: the model, also inside DistributedDataParallel, torch.compile or a PeftModel.
            layers: as for the class.

        Raises:
            TypeError: not a model of transformers.
            ValueError: a family without image tokens in its decoder's sequence; or no such layer.
        """
        inner: Any = unwrap(model)
        decoder = text_decoder(model)
        name, config = type(inner).__name__, inner.config
        if config.model_type in WITHOUT_IMAGE_TOKENS:
            raise ValueError(f"VisualTap: {name} has no image tokens: {WITHOUT_IMAGE_TOKENS[config.model_type]}")
        if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
            raise ValueError(f"VisualTap: the image tokens of {name} are in its encoder; {BUILD_IT}")
        ids = [getattr(config, key) for key in TOKENS if isinstance(getattr(config, key, None), int)]
        if not ids:
            raise ValueError(f"VisualTap: the configuration of {name} names no image token; {BUILD_IT}")
        return cls(decoder, lambda batch: _is_one_of(batch, ids), layers)

    def last_image_token(self) -> "VisualTap":
        """This tap at the last image token of each sample alone: its visual feature, for analysis.

        z then has a row for each sample that has a picture, in order, for each layer.
        """
        return VisualTap(self.text_module, lambda batch: _last(self.mask(batch)), self.layers)

    def last_instruction_token(self) -> "VisualTap":
        """This tap at the last token before the answer of each sample: its multimodal feature, for analysis.

        The answer begins where ``labels`` are first not -100; without labels there is none, and ``attention_mask``
        tells where a sample ends. z then has one row for each sample, in order, for each layer.
        """
        return VisualTap(self.text_module, lambda batch: _last(_before_the_answer(batch)), self.layers)

    def __call__(self, model: Callable[..., Any], batch: Batch) -> tuple[Any, Tensor]:
        """Run ``model(**batch)``.

        Returns:
            the model's output, and z of shape (layers × image tokens in the batch, hidden) with its graph.

        Raises:
            RuntimeError: the text module was not run.
            ValueError: the mask does not fit the hidden states.
        """
        return self._run(model, batch, stop=False)

    def features(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Z alone, without a graph: the model is run no further than its text module, so without head and loss.

        The same numbers as z of a whole run, bit for bit. Not for a model whose outer modules have to finish their
        pass, as those sharded by ``fully_shard`` or offloaded by accelerate, nor for a compiled one.

        Raises:
            RuntimeError: the text module was not run.
            ValueError: the mask does not fit the hidden states.
        """
        with torch.no_grad():
            return self._run(model, batch, stop=True)[1]

    def _run(self, model: Callable[..., Any], batch: Batch, stop: bool) -> tuple[Any, Tensor]:
        mask = self.mask(batch)
        seen: dict[int, Tensor] = {}

        def hook(place: int, from_input: bool) -> Callable[[nn.Module, Any, Any], None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                hidden = args if from_input else output
                seen[place] = hidden if isinstance(hidden, Tensor) else hidden[0]
                if stop and len(seen) == len(handles):
                    raise _Seen

            return keep

        handles: list[Any] = []
        for place, (module, from_input) in enumerate(self._places):
            handles.append(module.register_forward_hook(hook(place, from_input)))
        output = None
        try:
            output = model(**batch)
        except _Seen:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) < len(handles):
            raise RuntimeError(
                f"VisualTap: the model did not run its text module {type(self.text_module).__name__}; or it is "
                "compiled and ran before without the tap's hooks, which torch.compile does not look for again: set "
                "torch._dynamo.config.skip_nnmodule_hook_guards = False before its first call"
            )
        for hidden in seen.values():
            if mask.shape != hidden.shape[:2]:
                raise ValueError(
                    f"VisualTap: the mask has shape {tuple(mask.shape)}, the hidden states {tuple(hidden.shape)}: the "
                    "model changed the sequence, so its image tokens need a mask function of their own"
                )
        return output, torch.cat([seen[place][mask.to(seen[place].device)] for place in range(len(handles))])


class _Seen(BaseException):
    """All features are there; not an Exception, so that no model or trainer takes it for its own."""


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


def _place(text_module: nn.Module, layer: int) -> tuple[nn.Module, bool]:
    """The module whose output is this layer, or whose input if the second is true."""
    if layer == -1:
        return text_module, False
    blocks = decoder_layers(text_module)
    last = len(blocks)
    index = layer if layer >= 0 else last + 1 + layer
    if not 0 <= index <= last:
        raise ValueError(f"VisualTap: layers must be between {-last - 1} and {last}, got {layer}")
    if index == last:
        return text_module, False
    return blocks[max(index - 1, 0)], index == 0


def _is_one_of(batch: Batch, ids: list[int]) -> Tensor:
    if "input_ids" not in batch:
        raise ValueError(f"VisualTap: the batch has no 'input_ids' to find image tokens in, only {sorted(batch)}")
    tokens: Tensor = batch["input_ids"]
    return torch.isin(tokens, torch.tensor(ids, dtype=torch.int64, device=tokens.device))


def _before_the_answer(batch: Batch) -> Tensor:
    if "input_ids" not in batch:
        raise ValueError(f"VisualTap: the batch has no 'input_ids' to find instructions in, only {sorted(batch)}")
    mask: Tensor = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if batch.get("labels") is not None:
        mask = mask & ((batch["labels"] != -100).cumsum(1) == 0)
    if not mask.any(1).all():
        raise ValueError("VisualTap: labels begin with the first token of a sample: they are -100 at instructions")
    return mask


def _last(mask: Tensor) -> Tensor:
    """Of each row's true elements, the last."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)

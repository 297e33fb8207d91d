"""The features z whose loss is visual forgetting, and their alignment: equation (5) of MDGD (arXiv 2502.11740)."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_mdgd.models.check import replaced_tokens
from torch_mdgd.models.families import CROSS_ATTENTION, IN_FRONT, MARKS, PICTURES, TOKENS
from torch_mdgd.models.parts import decoder_layers, text_decoder, unwrap
from torch_mdgd.models.passes import Pass, known_of, meant

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
        self._looks_away = False

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
        name = type(inner).__name__
        config: Any = getattr(inner, "config", None)
        family = getattr(config, "model_type", None)
        if family in CROSS_ATTENTION:
            raise ValueError(
                f"VisualTap: {name} has no image tokens: it attends to pictures from outside its token sequence"
            )
        if family in IN_FRONT:
            raise ValueError(
                f"VisualTap: {name} puts pictures in front of its tokens, where none stands for them: {BUILD_IT} of "
                "the longer sequence"
            )
        if family and (config.is_encoder_decoder or config.get_text_config().is_encoder_decoder):
            raise ValueError(
                f"VisualTap: the image tokens of {name} are in its encoder: build VisualTap(encoder, mask) yourself, "
                "from the encoder of its language model, such as model.get_encoder(), and a function that marks image "
                "tokens"
            )
        decoder, ids = text_decoder(model), _token_ids([config])
        if ids:
            return cls(decoder, partial(_is_one_of, ids=ids), layers)
        for key, values in MARKS.items():
            if key in inspect.signature(inner.forward).parameters:
                return cls(decoder, partial(_is_marked, key=key, values=values), layers)
        raise ValueError(f"VisualTap: the configuration of {name} names no image token; {BUILD_IT}")

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

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Passes of the model inside are not about the batch's pictures, as that on a blank picture: no z is of them.

        For a loss whose gradient goes through several passes.
        """
        before, self._looks_away = self._looks_away, True
        try:
            yield
        finally:
            self._looks_away = before

    def __call__(self, model: Callable[..., Any], batch: Batch) -> tuple[Any, Tensor]:
        """Run ``model(**batch)``.

        If this runs the text module several times, z is of the pass that the loss's gradient goes through.

        Returns:
            the model's output, and z of shape (layers × image tokens in the batch, hidden) with its graph.

        Raises:
            RuntimeError: the text module was not run; or it was run several times, and the loss's gradient goes
                through several of these passes, or there is none.
            ValueError: the mask does not fit the hidden states.
            TypeError: the mask is no bool tensor.
        """
        output, passes = self._run(model, batch, stop=False)
        return output, self.of(passes, output, batch)

    def of(self, passes: list[Pass], output: Any, batch: Batch) -> Tensor:
        """Take z of a pass that was seen while :meth:`watching`, with its graph; errors are those of a call.

        Args:
            passes: what was seen.
            output: of the model.
            batch: its inputs.
        """
        passes = self._complete(passes)
        known = known_of(self.text_module)
        stopped, known.stopped = known.stopped, False
        known.several = known.several or len(passes) > 1
        index = meant(passes, output)
        if index and stopped:
            raise RuntimeError(
                "VisualTap: the loss ran the text module several times, which it did not before, and the features at "
                "the reference are of its first pass, not of the one that carries the gradient. This is known from now "
                "on: run the step again"
            )
        return self._at_images(passes[index], batch)

    def features(self, model: Callable[..., Any], batch: Batch, *, whole: bool = False) -> Tensor:
        """The features z alone, without a graph, from no more of the model than they need.

        They are z of a whole run, bit for bit. The model is left behind its text module, before head and
        loss, as soon as one call is known to run it once. A model whose passes without gradients are known to give
        other numbers is run with them.

        Args:
            model: a module, or a function that runs one.
            batch: its inputs.
            whole: run it to the end: for a model whose outer modules have to finish their pass, as those sharded by
                ``fully_shard`` or offloaded by accelerate, and for a compiled one.

        Raises:
            RuntimeError: as for a call.
            ValueError: the mask does not fit the hidden states.
            TypeError: the mask is no bool tensor.
        """
        known = known_of(self.text_module)
        if known.several:
            with torch.enable_grad():
                return self(model, batch)[1].detach()
        stop = not whole and (known.several is False or isinstance(model, nn.Module))
        with torch.set_grad_enabled(bool(known.other_kernels)):
            passes = self._complete(self._run(model, batch, stop)[1])
        if len(passes) > 1:
            known.several = True
            return self.features(model, batch)
        known.several = known.several if stop else False
        known.stopped = known.stopped or stop
        return self._at_images(passes[0], batch).detach()

    def check(self, model: nn.Module, batch: Batch) -> bool | None:
        """Whether this tap marks just the tokens that a model of transformers replaces by pictures; a warning if not.

        What enters the decoder is compared with the embedding table, so no name is trusted.

        Args:
            model: whose tap this is.
            batch: with pictures.

        Returns:
            None where it cannot be seen, as in models that scale embeddings on the way.
        """
        inner: Any = unwrap(model)
        training = [m for m in model.modules() if m.training]
        model.eval()
        try:
            found = replaced_tokens(model, self.text_module, inner.get_input_embeddings(), batch)
        finally:
            for module in training:
                module.training = True
        mask = image_tokens(self, batch)
        if found is None or torch.equal(found, mask):
            return None if found is None else True
        warnings.warn(
            f"VisualTap: {type(inner).__name__} replaces {int(found.sum())} tokens of this batch by pictures or "
            f"sounds, and the tap marks {int(mask.sum())}, of which {int((mask & ~found).sum())} are others",
            stacklevel=2,
        )
        return False

    def _run(self, model: Callable[..., Any], batch: Batch, stop: bool) -> tuple[Any, list[Pass]]:
        """The model's output, and what each pass of the text module left; stopped after the first, no output."""
        output = None
        with self.watching(stop) as passes, suppress(_Seen):
            output = model(**batch)
        return output, passes

    @contextmanager
    def watching(self, stop: bool = False) -> Iterator[list[Pass]]:
        """What passes of the text module leave while this is open; stopped after the first."""
        passes: list[dict[int, Tensor]] = []

        def hook(place: int, from_input: bool) -> Callable[[nn.Module, Any, Any], None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                if self._looks_away:
                    return
                if not passes or place in passes[-1]:
                    passes.append({})
                hidden = args if from_input else output
                passes[-1][place] = hidden if isinstance(hidden, Tensor) else hidden[0]
                if stop and len(passes[-1]) == len(handles):
                    raise _Seen

            return keep

        handles: list[Any] = []
        for place, (module, from_input) in enumerate(self._places):
            handles.append(module.register_forward_hook(hook(place, from_input)))
        try:
            yield passes  # type: ignore[misc]
        finally:
            for handle in handles:
                handle.remove()

    def _complete(self, passes: list[Pass]) -> list[Pass]:
        complete = [one for one in passes if len(one) == len(self._places)]
        if not complete:
            raise RuntimeError(
                f"VisualTap: the model did not run its text module {type(self.text_module).__name__}; or it is "
                "compiled and ran before without the tap's hooks, which torch.compile does not look for again: set "
                "torch._dynamo.config.skip_nnmodule_hook_guards = False before its first call"
            )
        return complete

    def _at_images(self, one: Pass, batch: Batch) -> Tensor:
        mask = image_tokens(self, batch)
        for hidden in one.values():
            if mask.shape != hidden.shape[:2]:
                raise ValueError(
                    f"VisualTap: the mask has shape {tuple(mask.shape)}, the hidden states {tuple(hidden.shape)}: the "
                    "model changed the sequence, so its image tokens need a mask function of their own"
                )
        return torch.cat([one[place][mask.to(one[place].device)] for place in range(len(one))])


def image_tokens(tap: VisualTap, batch: Batch) -> Tensor:
    """A tap's mask of a batch, bool of shape (batch, tokens).

    Raises:
        TypeError: it is no bool tensor: one of integers would select rows by their numbers.
    """
    mask = tap.mask(batch)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"VisualTap: the mask must be a bool tensor, true at image tokens, got {got}")
    return mask


def pictures_in(batch: Batch) -> list[str]:
    """Under which names a batch holds pictures or films: tensors that are not empty, also in lists of them."""
    held = {name: tree_leaves(batch.get(name)) for name in PICTURES}
    return [name for name, leaves in held.items() if any(isinstance(x, Tensor) and x.numel() for x in leaves)]


class _Seen(BaseException):
    """All features are there; not an Exception, so that no model or trainer takes it for its own."""


def visual_alignment_loss(z: Tensor, z_ref: Tensor, kind: Literal["l1", "mse"] = "l1") -> Tensor:
    """L_v of (5): the mean over tokens and channels of |z − z_ref|, or of its square; 0 for no tokens.

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


def _token_ids(configs: Sequence[Any]) -> list[int]:
    """What these configurations name as tokens of pictures or films; if nothing, what those inside them name."""
    values = [getattr(config, key, None) for config in configs for key in TOKENS]
    ids = sorted({x for x in values if isinstance(x, int) and not isinstance(x, bool) and x >= 0})
    inside = [x for config in configs for x in vars(config).values() if hasattr(x, "model_type")]
    return ids if ids or not inside else _token_ids(inside)


def _is_one_of(batch: Batch, ids: list[int]) -> Tensor:
    if "input_ids" not in batch:
        raise ValueError(f"VisualTap: the batch has no 'input_ids' to find image tokens in, only {sorted(batch)}")
    tokens: Tensor = batch["input_ids"]
    return torch.isin(tokens, torch.tensor(ids, dtype=torch.int64, device=tokens.device))


def _is_marked(batch: Batch, key: str, values: Sequence[int]) -> Tensor:
    """What a batch marks by itself; nothing if it does not, as one of text alone."""
    marks: Tensor | None = batch.get(key)
    if marks is None:
        if "input_ids" not in batch:
            raise ValueError(f"VisualTap: the batch has no {key!r} to find image tokens in, only {sorted(batch)}")
        return torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    return torch.isin(marks.long(), torch.tensor(values, dtype=torch.int64, device=marks.device))


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

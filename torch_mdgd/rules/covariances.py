"""C of every layer that the anchor holds: made of what enters the layer, summed over processes, reduced, saved.

Layers that share an input, as those of q, k and v, share its moments: here, on another device, after a checkpoint.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_mdgd.checks import first_of
from torch_mdgd.kernels import Tensors
from torch_mdgd.kernels.exact import exact
from torch_mdgd.models.linear import Linear, attended_tokens, prompt_tokens, rows, watching
from torch_mdgd.rules.base import as_count, count_of, nothing, require_shapes
from torch_mdgd.rules.moments import Covariance, Moments

SUMS, SIZE, SEEN = "anchor_sums", "anchor_size", "anchor_seen"

Tokens: TypeAlias = Literal["prompt", "image", "all"]


class Covariances:
    """What prompts bring to layers: summed for each, from the first steps or from a calibration, and C made of it.

    Args:
        rank: of the moments; None for the whole C.
        tokens: what counts in the text decoder.
        warmup: from how many steps C is made.
        relative: whether C is divided by the size of answers, else by the mean of its diagonal.

    Attributes:
        layers: those that are held, each under its key.
        moments: by key, of all inputs so far.
        answers: by key, Σ ‖y‖² of all answers so far, and their number; float64, shape (2,).
        seen: from how many steps these are; ``warmup`` once they are made.
        groups: processes whose inputs count, too.
    """

    def __init__(self, rank: int | None, tokens: Tokens, warmup: int, relative: bool) -> None:
        self.rank, self.tokens, self.warmup, self.relative = rank, tokens, warmup, relative
        self.layers: list[Linear] = []
        self.moments: dict[int, Moments] = {}
        self.answers: dict[int, Tensor] = {}
        self.seen = 0
        self.groups: Sequence[Any] = ()
        self._agreed = False
        # Of the step under way.
        self._new: dict[int, Moments] = {}
        self._new_answers: dict[int, Tensor] = {}
        self._empties: dict[Any, Moments] = {}
        self._reduced: dict[int, Covariance] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A process group belongs to its process.
        return {**vars(self), "groups": (), "_agreed": False, "_new": {}, "_new_answers": {}}

    def add(self, layers: Sequence[Linear], like: Sequence[Tensor]) -> None:
        """Hold more layers, of which nothing is known yet.

        Args:
            layers: the new ones.
            like: of each a tensor of its dtype, on its device.
        """
        for layer, x in zip(layers, like, strict=True):
            self.moments[layer.key] = self._empty(layer.width, x)
            self.answers[layer.key] = torch.zeros(2, dtype=torch.float64, device=x.device)
        self.layers += layers

    def of(self, layer: Linear) -> Covariance:
        """C of a layer, as it stands."""
        if layer.key not in self._reduced:
            total, count = self.answers[layer.key]
            size = total / count.clamp(min=1) if self.relative else None
            self._reduced[layer.key] = self.moments[layer.key].covariance(size)
        return self._reduced[layer.key]

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Hold all where the layers' parameters are."""
        for layer in self.layers:
            self._on(parameters[layer.key].device, layer.key)

    def _on(self, device: torch.device, key: int) -> Moments:
        held = self.moments[key]
        if held.sums.device != device:
            moved = held.to(device)
            shared = [other for other, moments in self.moments.items() if moments is held]
            self.moments |= dict.fromkeys(shared, moved)
            self.answers |= {other: self.answers[other].to(device) for other in shared}
            self._reduced = {}
        return self.moments[key]

    def _empty(self, width: int, like: Tensor) -> Moments:
        """Of no inputs: one for all layers of a kind, so that those which share an input go on sharing its moments."""
        kind = width, like.dtype, like.device
        return self._empties.setdefault(kind, Moments.empty(width, self.rank, like))

    # --------------------------------------------------------------------------------------------------------------
    # What enters the layers.

    @contextmanager
    def watching(self, images: Tensor, batch: Mapping[str, Any] | None) -> Iterator[None]:
        """A forward pass inside tells of the step under way; after an exception, nothing is known of that step.

        Args:
            images: bool, shape (batch, tokens), true at image tokens; read for ``tokens="image"`` alone.
            batch: what the model is called with.

        Raises:
            ValueError: a layer of the decoder sees another sequence than that of the batch; no ``input_ids``.
        """
        if self.tokens == "image":
            mask = images
        else:
            mask = prompt_tokens(batch) if self.tokens == "prompt" else attended_tokens(batch)
        last: list[Any] = []

        def see(layer: Linear, x: Tensor, y: Tensor) -> None:
            kind, key = (layer.in_text, layer.width, x._version), layer.key
            chosen = rows(x, mask, layer, batch)
            with torch.no_grad(), exact([x.device]):
                # That of q, k and v is one, and of a gate and what it multiplies.
                like = self._on(x.device, key).sums
                if not last or last[0] is not x or last[1] != kind:
                    last[:] = x, kind, Moments.of(_flat(x, chosen), layer.width, self.rank, like)
                answers = _flat(y, chosen).double()
                size = torch.stack([answers.square().sum(), answers.new_tensor(float(len(answers)))])
                self._new[key] = self._new[key].plus([last[2]]) if key in self._new else last[2]
                self._new_answers[key] = self._new_answers.get(key, torch.zeros_like(size)) + size

        try:
            with watching(self.layers, see):
                yield
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Forget the inputs of the step under way."""
        self._new, self._new_answers = {}, {}

    def close_step(self) -> None:
        """Take in what the passes of a step have brought to the layers, on all processes, while C is being made.

        Raises:
            RuntimeError: processes were calibrated with different batches.
        """
        if self.seen < self.warmup and (self._new or self.groups):
            self.take_in(self.groups)
            self.seen += 1
            if self.seen == self.warmup:
                self.warn_of_idle()
        if self.groups and not self._agreed:
            self._require_agreement()

    @contextmanager
    def made_anew(self) -> Iterator[None]:
        """What is taken in inside stands for all of C; after an exception nothing has changed."""
        before = self.moments, self.answers
        self.moments = {key: self._empty(held.sums.shape[1], held.sums) for key, held in self.moments.items()}
        self.answers = {key: torch.zeros_like(x) for key, x in self.answers.items()}
        self.forget()
        try:
            yield
        except BaseException:
            (self.moments, self.answers), self._reduced = before, {}
            raise
        self.seen = self.warmup

    def take_in(self, groups: Sequence[Any]) -> None:
        """Add the new inputs, of all processes of these groups, to the moments."""
        merged: dict[tuple[int, ...], Moments] = {}
        gathered: dict[int, list[Moments]] = {}
        for key, held in self.moments.items():
            new = self._new.get(key)
            if new is None and not groups:
                continue
            new = new or self._empty(held.sums.shape[1], held.sums)
            # Processes have to exchange as often, and need not share alike.
            if id(new) not in gathered or groups:
                others = [new]
                for group in groups:
                    others = [part for other in others for part in other.gathered(group)]
                gathered[id(new)] = others
            pair = id(held), id(new)
            if pair not in merged:
                merged[pair] = held.plus(gathered[id(new)])
            self.moments[key] = merged[pair]
            answers = self._new_answers.get(key, torch.zeros_like(self.answers[key]))
            for group in groups:
                torch.distributed.all_reduce(answers, group=group)
            if bool(answers.isfinite().all()):
                self.answers[key] = self.answers[key] + answers
        self.forget()
        self._reduced = {}

    def warn_of_idle(self) -> None:
        """Name the layers that C is zero of, once it is made: those that hold what other modules take from them."""
        answered = torch.stack([self.answers[layer.key][1].cpu() for layer in self.layers]).tolist()
        idle = [layer.name for layer, count in zip(self.layers, answered, strict=True) if not count]
        if idle:
            warnings.warn(
                "Anchor: no pass of those that C is made of has run these layers as modules, or at no token that "
                f"counts, so they are trained freely: {first_of(idle)}",
                stacklevel=4,
            )

    def _require_agreement(self) -> None:
        """Processes that hold different C would pull apart what they keep equal otherwise."""
        found = [torch.cat([held.size, self.answers[key]]) for key, held in self.moments.items()]
        sizes = torch.stack([x.to(found[0].device) for x in found])
        least, most = sizes.clone(), sizes.clone()
        for group in self.groups:
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group)
        if not torch.allclose(least, most, rtol=1e-3, atol=0):
            raise RuntimeError(
                "Anchor: each process was calibrated with batches of its own, so that they would pull differently: "
                "call calibrate(batches, group=torch.distributed.group.WORLD), or give all of them the same batches"
            )
        self._agreed = True

    # --------------------------------------------------------------------------------------------------------------
    # Checkpoints.

    def state(self, count: int) -> dict[str, Tensor | Sequence[Tensor]]:
        """The moments, beside each layer's first trained parameter of ``count``, and how far they are made."""
        sums, sizes = ([nothing() for _ in range(count)] for _ in range(2))
        for key, moments in self.moments.items():
            # Copies: layers share sums, and torch.distributed.checkpoint loads into what is here.
            sums[key], sizes[key] = moments.sums.clone(), torch.cat([moments.size, self.answers[key]])
        return {SUMS: sums, SIZE: sizes, SEEN: as_count(self.seen)}

    def check_state(self, found: Mapping[str, Tensors], count: int) -> None:
        """Raise a ValueError if other layers are held there, or with another rank."""
        shapes = {layer.place_in(found[SUMS]): self.moments[layer.key].sums.shape for layer in self.layers}
        require_shapes(SUMS, found[SUMS], [shapes.get(i, (0,)) for i in range(count)])

    def load_state(self, found: Mapping[str, Tensors]) -> None:
        """The opposite of :meth:`state`."""
        self.forget()
        self._reduced = {}
        last: Moments | None = None
        for layer in self.layers:
            key, at, held = layer.key, layer.place_in(found[SUMS]), self.moments[layer.key]
            sums, size = found[SUMS][at], found[SIZE][at]
            self.moments[key] = self._empty(held.sums.shape[1], held.sums)
            self.answers[key] = torch.zeros_like(self.answers[key])
            if sums is not None and size is not None:
                own, answers = size.to(held.size, copy=True).split(2)
                if last is None or not _equal(last, sums, own):
                    last = Moments(sums.to(held.sums, copy=True), own.clone(), self.rank)
                # Neighbours go on sharing what they shared.
                self.moments[key] = last
                self.answers[key] = answers.clone()
        self.seen = count_of(found, SEEN)


def _flat(x: Tensor, chosen: Tensor | None) -> Tensor:
    """The chosen rows of inputs or answers, shape (n, width)."""
    flat = x.detach().reshape(-1, x.shape[-1])
    return flat if chosen is None else flat[chosen.reshape(-1).to(x.device)]


def _equal(moments: Moments, sums: Tensor, size: Tensor) -> bool:
    same = moments.sums.shape == sums.shape and moments.sums.dtype == sums.dtype
    return same and torch.equal(moments.size, size) and torch.equal(moments.sums, sums.to(moments.sums.device))

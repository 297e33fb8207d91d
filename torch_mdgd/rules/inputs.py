"""Step space without a visual gradient: what a layer does to image tokens stays put.

A linear layer changes what it makes of an input x by ΔW x + Δb. For each one that is trained, the covariance of its
inputs at image tokens is followed,

    C ← decay · C + (1 − decay) · Σ x xᵀ / N          over the N image tokens of a step; x ends in 1 if there is a bias
    Q = the top eigenvectors of C that hold the fraction `energy` of its trace, anew every `refresh` steps
    [ΔW Δb] ← [ΔW Δb] (I − Q Qᵀ)                      of the move that the wrapped optimizer has made

so that no input in the span of Q is mapped to anything else. This costs one forward and one backward pass, and per
layer C, Q and the step's sum, each the square of its width. Other weights are not protected: those of norms, which
scale every token, embeddings, convolutions, and projections that are not ``nn.Linear`` modules. Nor are experts that a
router sends tokens to; a warning names those, and layers that no step runs as modules.

The paper has nothing like it. Adam-NSCL (CVPR 2021) projects Adam's step on the null space of the inputs of earlier
tasks; here the inputs to keep are those of the present step's pictures, and the optimizer is any.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd.checks import first_of, require_number, require_whole
from torch_mdgd.kernels import Tensors
from torch_mdgd.kernels.exact import exact
from torch_mdgd.models.linear import Linear, is_routed, rows, trained_linear_layers, watching
from torch_mdgd.models.parts import text_decoder
from torch_mdgd.parallel import dtensor
from torch_mdgd.rules.base import KINDS, Rule, Weights, as_count, count_of, nothing, require_shapes, task_alone

AGE, COVARIANCE, BASIS = "inputs_age", "covariance", "basis"
# How many numbers of covariances are decomposed together.
BATCH = 1 << 26


def top_eigenvectors(covariances: Tensor, energy: float, groups: Sequence[Any] = ()) -> list[Tensor]:
    """For each covariance the fewest of its largest eigenvectors that hold a fraction of its trace.

    Args:
        covariances: positive semidefinite, shape (n, width, width).
        energy: the fraction; with 0, and for a covariance that is zero, there are none.
        groups: processes that hold the same covariances, and get the same eigenvectors to the last bit.

    Returns:
        n matrices of shape (width, k), with k of their own.
    """
    values, vectors = torch.linalg.eigh(covariances)
    vectors = vectors.contiguous()
    for group in groups:
        for x in (values, vectors):
            torch.distributed.broadcast(x, group=group, group_src=0)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    larger = values.cumsum(-1) - values
    ranks = (larger < energy * values.sum(-1, keepdim=True)).sum(-1).tolist()
    return [q[:, :k].contiguous() for q, k in zip(vectors, ranks, strict=True)]


class ProtectInputs(Rule):
    """The wrapped optimizer gets g, and its move loses what changes layers' answers to image tokens.

    :func:`~torch_mdgd.mdgd_backward` runs one forward and one backward pass; a loop of your own runs its forward pass
    inside :meth:`observe`.

    A layer of the text decoder counts the marked tokens of its sequence; what enters any other layer, as in the
    projector and the vision tower, is all of pictures. With LoRA, its two matrices are such layers themselves, the
    second of so small a width that a lower ``energy`` leaves it more to learn with. Several ranks add up their sums,
    and hold the same C and Q.

    Args:
        model: whose modules are looked at; in DistributedDataParallel or not.
        energy: the fraction of each layer's visual inputs that is kept from change, in [0, 1].
        parts: of the model, to protect their layers alone, such as ``[connector(model)]``; all layers if None.
        decay: of the covariance per step that has image tokens, in [0, 1).
        refresh: after how many steps Q is computed anew, which takes the cube of a width: raise it for wide layers.
        text_module: the decoder; that of a model of transformers if None.

    Raises:
        ValueError: an argument out of range, naming it; a part that the model does not hold.
        TypeError: no ``text_module``, and not a model of transformers.
    """

    corrects = True
    measures_one = False

    def __init__(
        self,
        model: nn.Module,
        energy: float = 0.9,
        *,
        parts: Iterable[nn.Module] | None = None,
        decay: float = 0.95,
        refresh: int = 10,
        text_module: nn.Module | None = None,
    ) -> None:
        self.energy = require_number("ProtectInputs: energy", energy)
        self.decay = require_number("ProtectInputs: decay", decay)
        if not 0 <= self.energy <= 1:
            raise ValueError(f"ProtectInputs: energy must lie in [0, 1], got {energy!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"ProtectInputs: decay must lie in [0, 1), got {decay!r}")
        self.refresh = require_whole("ProtectInputs: refresh", refresh)
        self.age = 0
        self._model = model
        self._text = text_decoder(model) if text_module is None else text_module
        # None for all of them. Layers alone, for a list that holds several parts is none of the model's own.
        self._parts = None if parts is None else [m for part in parts for m in part.modules()]
        if not {m for m in self._parts or () if isinstance(m, nn.Linear)} <= set(model.modules()):
            raise ValueError("ProtectInputs: parts holds a layer that is no part of the model")
        self._count = 0
        # With places among the parameters: a layer may lose these very parameters when it is sharded.
        self._layers: list[Linear] = []
        # Layers that a warning has named, since no pass over pictures has run them.
        self._idle: set[str] = set()
        # By a layer's key: its name, its weight's and its bias's place, C, and Q.
        self.names: dict[int, str] = {}
        self._weights: dict[int, int] = {}
        self._biases: dict[int, int] = {}
        self.covariances: dict[int, Tensor] = {}
        self.bases: dict[int, Tensor] = {}
        # Of the step under way: Σ x xᵀ and N.
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}
        self._groups: Sequence[Any] = ()

    def __getstate__(self) -> dict[str, Any]:
        # A process group belongs to its process.
        return {**vars(self), "_groups": (), "_sums": {}, "_counts": {}}

    def attach(self, parameters: Sequence[Tensor], masked: bool) -> None:
        """Find the layers among the parameters of an optimizer.

        Raises:
            ValueError: there are none, it belongs to another optimizer already, or there is a mask.
        """
        if masked:
            raise ValueError("ProtectInputs mixes the elements of a row, and would move some outside a mask: drop one")
        super().attach(parameters, masked)
        self.extend(parameters)
        if not self.names:
            raise ValueError("ProtectInputs: the optimizer holds the weight of no nn.Linear of the model")

    def extend(self, parameters: Sequence[Tensor]) -> None:
        """Look for layers whose weights are in a new group."""
        places: dict[Any, int] = {p: self._count + i for i, p in enumerate(parameters)}
        self._count += len(parameters)
        found = [] if self._parts == [] else self._found(places)
        for layer in found:
            i, place = layer.key, layer.weight
            # Others are left out by `_found`.
            assert place is not None
            weight: Any = parameters[place - self._count + len(parameters)]
            if dtensor.is_sharded(weight) and any(p.is_shard() and p.dim for p in weight.placements):
                raise ValueError(f"ProtectInputs: {layer.name} is not sharded by rows, along its first dimension")
            self._layers.append(layer)
            self.names.setdefault(i, layer.name)
            self._weights[i] = place
            if layer.bias is not None:
                self._biases[i] = layer.bias
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.covariances[i] = torch.zeros(layer.width, layer.width, dtype=dtype, device=weight.device)
            self.bases[i] = self.covariances[i][:, :0]
        routed = [name for name, p in self._model.named_parameters() if p in places and is_routed(name)]
        if routed and self._parts is None:
            self._warn("experts that a router sends tokens to are not protected", routed)

    def _found(self, places: dict[Any, int]) -> list[Linear]:
        layers = trained_linear_layers(self._model, places, self._text, self._parts or (), adapters=False)
        return [layer for layer in layers if layer.weight is not None]

    def _warn(self, what: str, names: Sequence[str]) -> None:
        warnings.warn(f"ProtectInputs: {what}: {first_of(names)}", stacklevel=4)

    def needs(self, w: Weights, masked: bool) -> tuple[str, ...]:
        """The task gradient alone: one forward and one backward pass."""
        return KINDS[:1]

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """(1): the wrapped optimizer gets g."""
        return task_alone(products)

    def sum_over(self, groups: Sequence[Any]) -> None:
        """From now on, sums are over the processes of these groups too; :func:`mdgd_backward` says so itself."""
        self._groups = groups

    @contextmanager
    def observe(self, images: Tensor, batch: Mapping[str, Any] | None = None) -> Iterator[None]:
        """A forward pass inside tells of its inputs; those of micro-batches add up until the optimizer's next step.

        What gradient checkpointing runs again in a backward pass is not counted again. An exception inside discards
        what was seen for this step.

        Args:
            images: bool, shape (batch, tokens), true at image tokens.
            batch: what the model is called with; looked at for ``logits_to_keep`` alone.

        Raises:
            ValueError: a layer of the decoder sees another sequence than that of the images.
            RuntimeError: there are image tokens, and no layer was run: hooks that ``torch.compile`` has left out.
        """
        last: list[Any] = []

        def see(layer: Linear, x: Tensor, y: Tensor) -> None:
            i = layer.key
            kind = layer.in_text, i in self._biases, self._on(x.device, i).dtype, x._version
            # Those of q, k and v, and of a gate and what it multiplies, are one.
            if not last or last[0] is not x or last[1] != kind:
                with exact([x.device]):
                    last[:] = x, kind, *self._products(i, x.detach(), rows(x, images, layer, batch))
            for held, new in zip((self._sums, self._counts), last[2:], strict=True):
                held[i] = held[i] + new if i in held else new

        try:
            with watching(self._layers, see, self._text) as called:
                yield
            idle = [layer.name for layer in self._layers if layer not in called and layer.name not in self._idle]
            if idle and bool(images.any()):
                if not called:
                    raise RuntimeError(
                        "ProtectInputs: no protected layer was run inside observe, or hooks do not reach it"
                    )
                self._idle |= set(idle)
                self._warn("a pass over pictures did not run these layers as modules, so they are not protected", idle)
        except BaseException:
            self.forget()
            raise

    @torch.no_grad()
    def _products(self, i: int, x: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Σ x xᵀ and N."""
        like = self.covariances[i]
        x = x.reshape(-1, x.shape[-1]).to(like)
        if i in self._biases:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        if tokens is not None:
            # A product would let NaN of other tokens through, and an index would wait for the device.
            x = torch.where(tokens.to(x.device).reshape(-1, 1), x, torch.zeros_like(x))
        return x.T @ x, torch.full_like(like[0, 0], len(x)) if tokens is None else tokens.sum().to(like)

    def correct_(self, parameters: Tensors, before: Tensors, visual: Tensors | None, w: Weights) -> None:
        """Take in what the step has seen, and take its span out of the moves."""
        if self._sums or self._groups:
            self._follow()
        if due := self.age % self.refresh == 0:
            self._decompose()
        if any(q.shape[1] for q in self.bases.values()):
            self.age += 1
            self._remove_(dtensor.local(parameters), dtensor.local(before))
        elif not due:
            # Before the first picture it stays due.
            self.age += 1

    def _on(self, device: torch.device, i: int) -> Tensor:
        """The covariance C, on the device that its layer is on now."""
        if self.covariances[i].device != device:
            self.covariances[i], self.bases[i] = self.covariances[i].to(device), self.bases[i].to(device)
        return self.covariances[i]

    def _follow(self) -> None:
        for i, c in self.covariances.items():
            x, n = self._sums.pop(i, None), self._counts.pop(i, None)
            if self._groups or x is not None:
                # Layers may share a sum.
                x, n = (torch.zeros_like(c), c.new_zeros(())) if x is None or n is None else (x, n)
                if self._groups:
                    x, n = x.clone(), n.clone()
                for group in self._groups:
                    torch.distributed.all_reduce(x, group=group)
                    torch.distributed.all_reduce(n, group=group)
                new = self.decay * c + (1 - self.decay) * x / n
                # Without image tokens it is 0 / 0, and a step that a gradient scaler skips has Inf.
                c.copy_(torch.where(new.isfinite().all(), new, c))

    def _decompose(self) -> None:
        widths: dict[Any, list[int]] = {}
        for i, c in self.covariances.items():
            widths.setdefault((c.shape[0], c.dtype, c.device), []).append(i)
        for (width, *_), places in widths.items():
            size = max(1, BATCH // width**2)
            for chunk in (places[j : j + size] for j in range(0, len(places), size)):
                found = top_eigenvectors(torch.stack([self.covariances[i] for i in chunk]), self.energy, self._groups)
                self.bases |= dict(zip(chunk, found, strict=True))

    def _remove_(self, after: Tensors, before: Tensors) -> None:
        for i, q in self.bases.items():
            width = len(q) - (i in self._biases)
            rows = {self._weights[i]: q[:width]} | ({self._biases[i]: q[width:]} if i in self._biases else {})
            live = [(p, x, rows[j]) for j in rows if (p := after[j]) is not None and (x := before[j]) is not None]
            if live:
                along = torch.stack([_matrix(p - x).to(q.dtype) @ part for p, x, part in live]).sum(0)
                for p, _, part in live:
                    matrix = _matrix(p)
                    matrix.copy_(matrix.to(q.dtype) - along @ part.T)

    def forget(self) -> None:
        """Forget the sums of the step under way."""
        self._sums, self._counts = {}, {}

    def state(self) -> dict[str, Tensor | Sequence[Tensor]]:
        """C, and Q with zeros up to the width: of one shape at all times."""
        empty = [nothing() for _ in range(self._count)]
        covariances, bases = list(empty), list(empty)
        for i, c in self.covariances.items():
            covariances[i] = c.clone()
            bases[i] = nn.functional.pad(self.bases[i], (0, len(c) - self.bases[i].shape[1]))
        return {COVARIANCE: covariances, BASIS: bases, AGE: as_count(self.age)}

    def check_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """Raise a ValueError if what was protected there is not what is here."""
        for name in (COVARIANCE, BASIS):
            if name in found:
                shapes = {layer.place_in(found[name]): self.covariances[layer.key].shape for layer in self._layers}
                require_shapes(name, found[name], [shapes.get(i, (0,)) for i in range(len(parameters))])

    def load_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """The opposite of :meth:`state`; without it, nothing is known of inputs."""
        self.forget()
        self.age = count_of(found, AGE)
        for layer in self._layers:
            i, c = layer.key, self.covariances[layer.key]
            c.zero_()
            self.bases[i] = c[:, :0]
            at = layer.place_in(found[COVARIANCE]) if COVARIANCE in found else i
            covariance, basis = (found[name][at] if name in found else None for name in (COVARIANCE, BASIS))
            if covariance is not None and basis is not None:
                c.copy_(covariance)
                self.bases[i] = basis[:, : int(basis.any(0).sum())].to(c, copy=True)


def _matrix(x: Tensor) -> Tensor:
    """A weight, or a bias as a matrix of one column: a view."""
    return x.unsqueeze(1) if x.dim() == 1 else x

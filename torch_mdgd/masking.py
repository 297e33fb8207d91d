"""Masks of MDGD-GM: which numbers may move (10), and the baselines that any mask has to beat.

A mask is chosen once, from scores or without any, and numbers outside it stay bit-identical, whatever the wrapped
optimizer does with momentum or weight decay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from torch_mdgd import kernels, sharded
from torch_mdgd.equations import Similarity, product
from torch_mdgd.settings import is_finite, require_whole


@runtime_checkable
class Mask(Protocol):
    """Chooses which numbers may move."""

    @property
    def scored(self) -> bool:
        """Whether it needs g~ and g~0 of a step; if not, it is chosen when the optimizer is wrapped."""

    @property
    def warmup(self) -> int:
        """For how many steps gradients are added up before the first choice; nothing moves until then."""

    @property
    def refresh(self) -> int | None:
        """After how many steps it is chosen anew, None for never."""

    def choose(self, parameters: Sequence[Tensor], gradients: "ScoreInputs | None") -> list[Tensor]:
        """Bool tensors of the parameters' shapes."""


@dataclass(frozen=True)
class ScoreInputs:
    """What similarities are computed from: g, v, g~0, and ⟨g, v⟩ / ⟨v, v⟩ of each parameter, shape (T,)."""

    g: kernels.Role
    v: kernels.Role
    g0_tilde: kernels.Role
    a: Tensor


@dataclass(frozen=True)
class TopK:
    """The fraction ρ of numbers with the largest similarity s of their gradients g~ and g~0 (10).

    Exactly max(1, round(ρ n)) of n numbers; ties go to the lowest index in parameter order. While θ = φ the two
    gradients are equal, so that a mask chosen once, at the start, is the top ρ by |g|.

    Args:
        fraction: ρ in (0, 1].
        scope: "global" counts over all parameters together, "tensor" within each.
        refresh: choose anew every so many steps; None keeps the first choice. Under an optimizer with second moments
            a mask that changes often does harm: a number that was rarely chosen jumps when it is.
        warmup: how many steps' gradients are added up for the first choice; weights wait until it is made.
        similarity: s as a function of g~ and g~0 (float64 blocks of one shape): :func:`~torch_mdgd.equations.product`
            as published, :func:`~torch_mdgd.equations.sign_agreement`, or any elementwise callable.

    Raises:
        ValueError: an argument is out of range, naming it.
    """

    fraction: float = 0.10
    scope: Literal["global", "tensor"] = "global"
    refresh: int | None = None
    warmup: int = 1
    similarity: Similarity = product
    scored = True

    def __post_init__(self) -> None:
        _require_fraction("TopK", self.fraction)
        _require_scope("TopK", self.scope)
        if self.refresh is not None:
            require_whole("TopK: refresh", self.refresh)
        require_whole("TopK: warmup", self.warmup)

    def choose(self, parameters: Sequence[Tensor], gradients: ScoreInputs | None) -> list[Tensor]:
        """The mask of these gradients, which hold no NaN or Inf."""
        assert gradients is not None
        roles = (gradients.g, gradients.v, gradients.g0_tilde)
        g, v, g0 = ([_filled(x, p) for x, p in zip(role, parameters, strict=True)] for role in roles)

        def masks(rows: slice, k: int) -> list[Tensor]:
            scored = g[rows], v[rows], g0[rows], gradients.a[rows]
            return sharded.top_k_similarity_masks(*scored, k, self.similarity)

        return _over(self.scope, parameters, self.fraction, masks)


@dataclass(frozen=True)
class Magnitude:
    """The fraction of numbers that are largest in absolute value when the optimizer is wrapped: a baseline.

    Args:
        fraction: in (0, 1]; counted as in :class:`TopK`.
        scope: as in :class:`TopK`.
    """

    fraction: float = 0.10
    scope: Literal["global", "tensor"] = "global"
    scored = False
    warmup = 1
    refresh = None

    def __post_init__(self) -> None:
        _require_fraction("Magnitude", self.fraction)
        _require_scope("Magnitude", self.scope)

    def choose(self, parameters: Sequence[Tensor], gradients: ScoreInputs | None) -> list[Tensor]:
        """The mask of these parameters."""
        scores = [p.detach().abs() for p in parameters]
        return _over(self.scope, parameters, self.fraction, lambda rows, k: sharded.top_k_masks(scores[rows], k))


@dataclass(frozen=True)
class Random:
    """A fraction of all numbers, drawn at random: the baseline.

    Args:
        fraction: in (0, 1]; counted exactly, over all parameters.
        seed: of the draw, which is the same on every device.
    """

    fraction: float = 0.10
    seed: int = 0
    scored = False
    warmup = 1
    refresh = None

    def __post_init__(self) -> None:
        _require_fraction("Random", self.fraction)

    def choose(self, parameters: Sequence[Tensor], gradients: ScoreInputs | None) -> list[Tensor]:
        """A mask for these parameters."""
        generator = torch.Generator().manual_seed(self.seed)
        draws = (torch.rand(p.shape, generator=generator, dtype=torch.float64) for p in parameters)
        scores = [sharded.shard_like(x, p) for x, p in zip(draws, parameters, strict=True)]
        return _over("global", parameters, self.fraction, lambda rows, k: sharded.top_k_masks(scores[rows], k))


@dataclass(frozen=True)
class Given:
    """A mask made elsewhere.

    Args:
        masks: bool tensors of the parameters' shapes, in parameter order; at least one number is true.
    """

    masks: Sequence[Tensor]
    scored = False
    warmup = 1
    refresh = None

    def choose(self, parameters: Sequence[Tensor], gradients: ScoreInputs | None) -> list[Tensor]:
        """These masks, checked.

        Raises:
            ValueError: they do not fit the parameters, naming the first that does not.
        """
        if len(self.masks) != len(parameters):
            raise ValueError(f"Given: {len(self.masks)} masks for {len(parameters)} parameters")
        for i, (mask, p) in enumerate(zip(self.masks, parameters, strict=True)):
            if mask.dtype != torch.bool or mask.shape != p.shape:
                raise ValueError(
                    f"Given: mask {i} is {mask.dtype} of shape {tuple(mask.shape)}, its parameter needs bool of "
                    f"{tuple(p.shape)}"
                )
        masks = [sharded.shard_like(mask, p) for mask, p in zip(self.masks, parameters, strict=True)]
        if not sharded.count(masks):
            raise ValueError("Given: no number is true in any mask, so nothing could be trained")
        return masks


@torch.no_grad()
def restore_outside_(parameters: Sequence[Tensor], before: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Give every number outside its mask the value it had before, bit for bit."""
    for p, x, mask in zip(parameters, before, masks, strict=True):
        p.copy_(torch.where(mask, p, x))


def count(fraction: float, n: int) -> int:
    """How many of n numbers a fraction keeps: max(1, round(fraction · n))."""
    return max(1, round(fraction * n))


def _over(
    scope: str, parameters: Sequence[Tensor], fraction: float, masks: Callable[[slice, int], list[Tensor]]
) -> list[Tensor]:
    if scope == "global":
        return masks(slice(None), count(fraction, sum(p.numel() for p in parameters)))
    return [
        masks(slice(t, t + 1), count(fraction, p.numel()))[0] if p.numel() else torch.zeros_like(p, dtype=torch.bool)
        for t, p in enumerate(parameters)
    ]


def _filled(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x


def _require_fraction(name: str, fraction: float) -> None:
    if not is_finite(fraction) or not 0 < fraction <= 1:
        raise ValueError(f"{name}: fraction must lie in (0, 1], got {fraction!r}")


def _require_scope(name: str, scope: str) -> None:
    if scope not in ("global", "tensor"):
        raise ValueError(f"{name}: scope must be 'global' or 'tensor', got {scope!r}")

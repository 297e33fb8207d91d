"""Where φ, the mask and the wrapped optimizer's state live: at full size, or for the elements inside the mask alone."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_mdgd.kernels import Tensors
from torch_mdgd.masks.base import Mask, ScoreInputs
from torch_mdgd.parallel import dtensor

Correct: TypeAlias = Callable[[Tensors, Tensors], None]
"""Is given the parameters after a step and their values before it, both None for one that took no part."""

ONCE = ("step", "mu_product")
"""What torch's optimizers keep once for a parameter, as a tensor of 0 dimensions."""

# What is loaded: by name, one tensor for each parameter, None for one that had none.
Entries: TypeAlias = Mapping[str, Sequence[Tensor | None]]


class Storage(ABC):
    """φ, the mask and the state of the wrapped optimizer, for T parameters.

    A parameter that does not require gradients has no φ, and counts in no mask. Its φ is its value when it first
    requires them.

    Args:
        parameters: in parameter order.
        mask: what chooses the mask, at some time; None for no mask.

    Attributes:
        mask: the same.
        trained: T times whether the parameter has required gradients.
        swapped: whether φ is in the parameters.
        age: how many steps were combined since the mask was chosen.
    """

    def __init__(self, parameters: Sequence[Tensor], mask: Mask | None) -> None:
        self.mask = mask
        self.trained = [False] * len(parameters)
        self.swapped = False
        self.age = 0

    def __len__(self) -> int:
        return len(self.trained)

    @property
    @abstractmethod
    def masked(self) -> bool:
        """Whether a mask has been chosen."""

    @property
    def scored(self) -> bool:
        """Whether the mask is chosen in a step, so that in a state dict from before that there is none."""
        return self.mask is not None and self.mask.scored

    def mask_is_due(self) -> bool:
        """Whether the mask is to be chosen, first or anew, by the gradients of the step under way."""
        refresh = None if self.mask is None else self.mask.refresh
        return self.scored and (not self.masked or (refresh is not None and self.age >= refresh))

    @abstractmethod
    def kept(self, parameters: Sequence[Tensor]) -> tuple[int, int]:
        """How many elements may move, of how many trained ones."""

    @abstractmethod
    def extend(self, parameters: Sequence[Tensor]) -> None:
        """Take in new parameters, at their values now."""

    @abstractmethod
    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Hold all where the parameters are: moved, sharded or unfrozen since the last call, as by accelerate."""

    @abstractmethod
    def drop(self, zero: Sequence[bool | None]) -> bool:
        """Hold no φ of the parameters that this is not None of: it is zero where True, and the present value else.

        That is right of LoRA's B and A, which together are nothing at φ. Returns whether it is done.
        """

    @property
    def dropped(self) -> bool:
        """Whether :meth:`drop` was done."""
        return False

    @abstractmethod
    def exchange_(self, parameters: Sequence[Tensor], places: bool = False) -> None:
        """Swap θ and φ; with ``places`` their places in memory, where they have such."""

    @abstractmethod
    def difference(self, parameters: Sequence[Tensor], t: int) -> Tensor:
        """θ − φ of a parameter, a new tensor; of a sharded one, this process's shard. Zero if it was never trained."""

    @abstractmethod
    def has_moved(self, parameters: Sequence[Tensor], t: int) -> bool:
        """Whether a trained parameter differs from φ; of a sharded one, this process's shard. It takes no buffer."""

    @torch.no_grad()
    def first_moved(self, parameters: Sequence[Tensor]) -> int | None:
        """The first trained parameter that differs from φ; None if none does, as on the meta device."""
        trained = (t for t, one in enumerate(self.trained) if one and parameters[t].device.type != "meta")
        return next((t for t in trained if self.has_moved(parameters, t)), None)

    def choose(self, gradients: ScoreInputs | None, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Let the mask choose; nothing is changed.

        Args:
            gradients: of the step, for T parameters; None for a mask that is not scored.
            parameters: T parameters.

        Returns:
            T masks for :meth:`confine`.
        """
        assert self.mask is not None
        trained = [t for t, one in enumerate(self.trained) if one]
        if gradients is not None:
            g, v, g0_tilde = ([xs[t] for t in trained] for xs in (gradients.g, gradients.v, gradients.g0_tilde))
            gradients = ScoreInputs(g, v, g0_tilde, gradients.a[trained])
        masks = dict(zip(trained, self.mask.choose([parameters[t] for t in trained], gradients), strict=True))
        return [masks.get(t) for t in range(len(self))]

    @abstractmethod
    def confine(self, masks: Tensors, base: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Let only the elements inside these masks move from now on; None for a parameter that is not trained.

        The state of an element that comes in anew begins at zero.
        """

    @abstractmethod
    def restrict_(self, v: Tensors) -> list[Tensor | None]:
        """The directions v inside the mask, of the size that :meth:`step` gives to its correction."""

    @abstractmethod
    def combine_(self, d: Tensors, gradients: Sequence[Tensors], coefficients: Tensor) -> None:
        """Write the linear combination of the gradients, under the mask, over d."""

    @abstractmethod
    def step(self, base: Optimizer, parameters: Sequence[Tensor], correct_: Correct | None) -> None:
        """One step of the wrapped optimizer, and the correction of its moves; :meth:`follow` was called before."""

    @abstractmethod
    def switch(self, base: Optimizer, parameters: Sequence[Tensor], mode: Callable[[], Any]) -> None:
        """Run ``base.train`` or ``base.eval``, which may change parameters; elements outside the mask stay."""

    @abstractmethod
    def renew(self, parameters: Sequence[Tensor], values: Sequence[Tensor] | None) -> None:
        """Let φ be these values from now on, or the parameters' own.

        Raises:
            ValueError: a value of another shape, or one that cannot be kept, naming it.
        """

    @abstractmethod
    def save(self, base: Optimizer) -> tuple[dict[str, Any], dict[str, Tensors]]:
        """The wrapped optimizer's state dict, and what is held here, by name. All processes call it."""

    @abstractmethod
    def load(self, inner: dict[str, Any], found: Entries, base: Optimizer, parameters: Sequence[Tensor]) -> bool:
        """The opposite of :meth:`save`; returns whether φ was there.

        Raises:
            ValueError: it was saved by another kind of storage or from other parameters; nothing was changed.
        """


def is_per_element(name: str, value: Any, shape: Sequence[int]) -> bool:
    """Whether an entry in an optimizer's state is of each element of a parameter of this shape.

    Of a parameter of 0 dimensions this cannot be told from the shape.
    """
    return isinstance(value, Tensor) and value.shape == torch.Size(shape) and name not in ONCE


def counts(masks: Tensors) -> list[int]:
    """How many elements are true in each mask, 0 for None. All processes call it."""
    found = iter(dtensor.counts([m for m in masks if m is not None]))
    return [0 if m is None else next(found) for m in masks]


def warn_of_late(t: int) -> None:
    """Of a parameter that is trained only after the mask was chosen."""
    warnings.warn(
        f"parameter {t} requires gradients only since the mask was chosen, which has none of its elements: it stays as "
        "it is until a mask is chosen anew. Unfreeze it before the optimizer is wrapped",
        stacklevel=2,
    )


@torch.no_grad()
def snapshot(x: Tensor) -> Tensor:
    """A detached copy."""
    return x.detach().clone()

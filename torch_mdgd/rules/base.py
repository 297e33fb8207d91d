"""A rule: what becomes of the gradients that were captured in one step. It is the one thing that methods differ in.

A rule does up to three things. It combines gradients linearly, with scalars from their inner products. It corrects the
parameters after the wrapped optimizer's step. It looks at activations or features on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_mdgd.checks import require_number
from torch_mdgd.kernels import Tensors, combine_, inner_products, ratio

PREFIX = "mdgd_"
"""What begins the name of everything of ours in parameter groups and in parameters' state."""

KINDS = ("task", "visual", "reference_task", "reference_visual")
"""The gradients that can be captured: g and v at the current weights θ, g₀ and v₀ at the reference φ."""

Weights: TypeAlias = Mapping[str, Tensor]
"""The rule's weights, such as α, for each parameter: float64, shape (T,)."""


class Rule:
    """The base of all rules. A rule of your own overrides :meth:`coefficients`, and what else it needs.

    T is the number of parameters, in the optimizer's order. A rule with a :meth:`state` of its own belongs to one
    optimizer: another one, as for the next task, needs a new rule.

    Attributes:
        weights: names and values of what can be set. The optimizer copies them into every parameter group as
            ``mdgd_<name>``; a group may hold its own value, and a schedule may change it.
        corrects: whether :meth:`correct_` is called after each step of the wrapped optimizer.
        measures_one: whether :meth:`coefficients` reads ⟨g, g⟩ where g is the only gradient. Where it does not, the
            table holds NaN, and a step saves a pass over g.
    """

    weights: Mapping[str, float] = {}
    corrects: bool = False
    measures_one: bool = True
    _attached = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value:g}' for name, value in self.weights.items())})"

    def attach(self, parameters: Sequence[Tensor], masked: bool) -> None:
        """Called when the optimizer is built. A rule that overrides this calls it, too.

        Args:
            parameters: T parameters.
            masked: whether a mask is chosen at some time.

        Raises:
            ValueError: the rule cannot work on these parameters or under a mask, or has state and belongs to another
                optimizer.
        """
        if self._attached and self.state():
            raise ValueError(
                f"{type(self).__name__} belongs to another optimizer already, whose state it holds: make a new one, "
                "also for the next task; a Trainer that makes several optimizers takes a function of the model"
            )
        self._attached = True

    def extend(self, parameters: Sequence[Tensor]) -> None:
        """Called when another parameter group was added.

        Args:
            parameters: the new ones, behind those that were there.
        """

    def needs(self, w: Weights, masked: bool) -> tuple[str, ...]:
        """The gradients that :meth:`coefficients` needs, of ``KINDS``. A step without pictures needs "task" alone.

        Args:
            w: the weights, on the CPU.
            masked: whether a mask is chosen at some time.
        """
        return KINDS[:2]

    def joint(self, w: Weights, masked: bool) -> float | None:
        """α where d = g + αv with one α for all parameters; None where g and v are needed apart.

        One backward pass of L + αL_v then gives d.

        Args:
            w: the weights, on the CPU.
            masked: whether a mask is chosen at some time.
        """
        return None

    def drift(self, products: Tensor) -> Tensor:
        """⟨g, v⟩ / ⟨v, v⟩, by which (6) and (7) remove v from g; shape (T,).

        Args:
            products: inner products of (g), of (g, v, ...) or of (g₀, v₀), float64, shape (T, R, R).
        """
        return drift(products)

    def coefficients(self, products: Tensor, w: Weights, masked: bool) -> Tensor:
        """What g, v and g̃₀ are multiplied with; their sum is d.

        Args:
            products: inner products of the R gradients of this step, float64, shape (T, R, R). R is 3 for
                (g, v, g̃₀), 2 for (g, v), 1 for g alone or for g + αv of one backward pass. A missing gradient is zero.
            w: the weights, on the device of the products.
            masked: whether d is of (11), under a mask.

        Returns:
            float64, shape (T, R). A coefficient of 0 still carries NaN and Inf along.
        """
        raise NotImplementedError

    def pull_(
        self,
        g: Tensors,
        parameters: Sequence[Tensor],
        difference: Callable[[int], Tensor],
        w: Weights,
        scale: float,
    ) -> None:
        """Add a term of the rule's own to g, in place, before d is combined.

        Args:
            g: T gradients; None for a parameter that has none.
            parameters: T parameters.
            difference: θ − φ of parameter t, a new tensor; of a sharded parameter, this process's shard.
            w: the weights, on the CPU.
            scale: the loss scale that g carries.
        """

    def correct_(self, parameters: Tensors, before: Tensors, visual: Tensors | None, w: Weights) -> None:
        """Correct the parameters after the wrapped optimizer's step, in place.

        In a compact storage all tensors hold the selected elements, 1-D.

        Args:
            parameters: T parameters; None for one that took no part in the step.
            before: their values before it, to be overwritten at will.
            visual: v of this step, inside the mask; None if none was captured.
            w: the weights, on the CPU.
        """

    def observe(self, images: Tensor, batch: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
        """Around the forward pass at θ.

        Args:
            images: bool, shape (batch, tokens), true at image tokens.
            batch: what the model is called with.
        """
        return nullcontext()

    def saw_features(self, z: Tensor, z_ref: Tensor, average: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Called with the features of each micro-batch that has pictures.

        Args:
            z: features at θ, shape (tokens, hidden).
            z_ref: those of the same tokens at φ.
            average: the mean over the processes that share the batch.
        """

    def sum_over(self, groups: Sequence[Any]) -> None:
        """From now on, what the rule sums over tokens is summed over the processes of these groups too."""

    def forget(self) -> None:
        """What was seen for the step under way is of no use: it was made, or is not going to be."""

    def state(self) -> dict[str, Tensor | Sequence[Tensor]]:
        """What a checkpoint has to hold: by name, one tensor for each parameter, or one of 0 dimensions for all.

        The names are there from the beginning, with their final shapes: ``torch.distributed.checkpoint`` loads what a
        fresh optimizer has, and nothing else.
        """
        return {}

    def check_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """Raise a ValueError if :meth:`load_state` could not load this; nothing has been changed yet."""

    def load_state(self, found: Mapping[str, Tensors], parameters: Sequence[Tensor]) -> None:
        """The opposite of :meth:`state`; without its names, begin anew, or keep what cannot be made again.

        Args:
            found: by name, one tensor for each parameter in any case, None for one that is not trained.
            parameters: T parameters.
        """

    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars about the last step, by name, for the optimizer's ``diagnostics``."""
        return {}


def checked(rule: type[Rule], **weights: Any) -> dict[str, float]:
    """Weights as floats; a ValueError that names rule and argument unless each is a finite number ≥ 0."""
    return {name: require_number(f"{rule.__name__}: {name}", value, least=0) for name, value in weights.items()}


def drift(products: Tensor) -> Tensor:
    """⟨g, v⟩ / ⟨v, v⟩ of (6), from the table of inner products of (g, v, ...), 0 without v; shape (T,)."""
    if products.shape[-1] == 1:
        return torch.zeros_like(products[:, 0, 0])
    return ratio(products[:, 0, 1], products[:, 1, 1])


def decoupled_(
    g0: Tensors,
    v0: Tensors,
    drift_of: Callable[[Tensor], Tensor],
    products_of: Callable[[Sequence[Tensors], Sequence[Tensors]], Tensor] = inner_products,
) -> list[Tensor | None]:
    """g̃₀ = g₀ − drift · v₀ (7), written over g₀, or over v₀ where a parameter has no g₀.

    It is formed before anything is multiplied with it: ⟨g̃₀, g̃₀⟩ from the expanded square would lose every digit when
    g₀ is nearly parallel to v₀.

    Args:
        g0: T tensors.
        v0: T tensors.
        drift_of: the rule's, of the table of inner products of (g₀, v₀).
        products_of: inner products, of whole gradients where these are parts of them.
    """
    out = [x if x is not None else y for x, y in zip(g0, v0, strict=True)]
    along = products_of([g0, v0], [v0])
    b = drift_of(torch.cat([torch.zeros_like(along), along], dim=2))
    combine_(out, [g0, v0], torch.stack([torch.ones_like(b), -b], dim=1))
    return out


def agreement(products: Tensor, a: Tensor) -> Tensor:
    """⟨g̃, g̃₀⟩ / ⟨g̃₀, g̃₀⟩ of (8), from the table of (g, v, g̃₀); shape (T,).

    ⟨g̃, g̃₀⟩ = ⟨g, g̃₀⟩ − a ⟨v, g̃₀⟩ is linear in g̃, so g̃ need not be formed: r is off by no more than the rounding of
    g, as it would be with g̃ formed in the precision of the gradients.

    Args:
        products: float64, shape (T, 3, 3).
        a: :func:`drift` of the same table.
    """
    return ratio(products[:, 0, 2] - a * products[:, 1, 2], products[:, 2, 2])


def task_alone(products: Tensor) -> Tensor:
    """The coefficients of d = g, shape (T, R)."""
    out = torch.zeros(products.shape[:2], dtype=products.dtype, device=products.device)
    out[:, 0] = 1
    return out


def as_count(n: int) -> Tensor:
    """A number of steps as a checkpoint holds it: int64, 0 dimensions, on the CPU."""
    return torch.tensor(n, dtype=torch.int64, device="cpu")


def nothing() -> Tensor:
    """What a checkpoint holds of a parameter of which there is nothing to say: float32, shape (0,), on the CPU."""
    return torch.zeros(0, dtype=torch.float32, device="cpu")


def lone(found: Mapping[str, Tensors], name: str) -> Tensor | None:
    """What was saved once for all parameters; None if it is not there."""
    return next((x for x in found.get(name, ()) if x is not None), None)


def count_of(found: Mapping[str, Tensors], name: str) -> int:
    """A number of steps that was saved once for all parameters; 0 if it is not there."""
    n = lone(found, name)
    return 0 if n is None else int(n)


def require_shapes(name: str, tensors: Tensors, shapes: Sequence[Sequence[int]]) -> None:
    """Raise a ValueError that names the first parameter whose loaded tensor has another shape than it needs."""
    for i, (x, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if x is not None and tuple(x.shape) != tuple(shape):
            raise ValueError(
                f"the loaded state dict's {PREFIX + name!r} of parameter {i} has shape {tuple(x.shape)}, needed is "
                f"{tuple(shape)}: it was saved from another model or in another parameter order"
            )

"""The reference φ: the trainable values as they were when fine-tuning began, and how to evaluate there.

One copy of the trainable numbers, exchanged in place with the live ones. A second model would cost the frozen
numbers too; functional calls and pointer swaps are silently wrong under gradient checkpointing and sharding.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

# How many numbers are held at a time while two tensors are swapped.
PIECE = 1 << 20


@torch.no_grad()
def exchange_(parameters: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    """Swap the contents of each parameter with those of its value, bit for bit; None leaves one alone.

    ``copy_`` and not ``.data``: autograd then sees the change, and refuses a backward pass through a graph that was
    built on the other values.

    Raises:
        ValueError: a shape or dtype differs, naming the parameter's position.
    """
    pairs = [(i, p, x) for i, (p, x) in enumerate(zip(parameters, values, strict=True)) if x is not None]
    for i, p, x in pairs:
        if p.shape != x.shape or p.dtype != x.dtype:
            raise ValueError(
                f"parameter {i} is {p.dtype}, shape {tuple(p.shape)}, but its reference {x.dtype}, {tuple(x.shape)}: "
                "parameters were replaced or cast after MDGDOptimizer was built; wrap the optimizer last"
            )
    all_or_none(_swap_, [pieces for _, p, x in pairs for pieces in _pieces(p, x)])
    forget_casts()


def all_or_none(swap: Callable[..., None], rows: Iterable[tuple[Tensor, ...]]) -> None:
    """Swap row by row. If there is no memory for one, those before it are swapped back: θ and φ are never mixed."""
    done: list[tuple[Tensor, ...]] = []
    try:
        for row in rows:
            swap(*row)
            done.append(row)
    except BaseException:
        for row in done:
            swap(*row)
        raise


def _swap_(p: Tensor, x: Tensor) -> None:
    held = p.clone()
    p.copy_(x)
    x.copy_(held)


def _pieces(p: Tensor, x: Tensor) -> list[tuple[Tensor, ...]]:
    """Views small enough that there is memory to swap them even after an exception for want of memory."""
    whole = all(type(y) in (Tensor, nn.Parameter) and y.is_contiguous() for y in (p, x))
    if p.numel() <= PIECE or not whole:
        return [(p, x)]
    return list(zip(p.view(-1).split(PIECE), x.view(-1).split(PIECE), strict=True))


def forget_casts() -> None:
    """Drop the low-precision copies that autocast keeps: it does not see that a parameter was written to."""
    torch.clear_autocast_cache()

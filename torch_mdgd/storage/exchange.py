"""The reference φ: the trainable values as they were when fine-tuning began, and how to evaluate there.

One copy of the trained elements, exchanged in place with the live ones. A second model would cost the frozen
elements too; functional calls are silently wrong under gradient checkpointing and sharding. For passes without a graph,
through modules that look up their parameters anew, θ and φ may swap places in memory instead, which takes no time.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from torch_mdgd.parallel import dtensor

# How many numbers are held at a time while two tensors are swapped: on a CPU they stay in a cache.
PIECE, PIECES_AT_ONCE = 1 << 16, 64


def require_apart(parameters: Sequence[Tensor]) -> None:
    """Raise a ValueError for a parameter that is there twice, or two trained ones at one address, naming them.

    Exchanged twice, θ would be lost. Tied weights are so after ``load_state_dict(..., assign=True)``, which makes two
    parameters of one.
    """
    if len(set(parameters)) < len(parameters):
        raise ValueError("base holds a parameter more than once, so its values could not be exchanged in place")
    seen: dict[tuple[torch.device, int], int] = {}
    for i, (p, part) in enumerate(zip(parameters, dtensor.local(parameters), strict=True)):
        if p.requires_grad and type(part) in dtensor.PLAIN and part.numel() and part.device.type != "meta":
            first = seen.setdefault((part.device, part.data_ptr()), i)
            if first != i:
                raise ValueError(
                    f"parameters {first} and {i} share memory, and are not one parameter: tie them anew, as "
                    "model.tie_weights() does, before the optimizer is made"
                )


@torch.no_grad()
def exchange_(parameters: Sequence[Tensor], values: Sequence[Tensor | None], places: bool = False) -> None:
    """Swap the contents of each parameter with those of its value, bit for bit; None leaves one alone.

    Autograd sees the change, and refuses a backward pass through a graph that was built on the other values.

    Args:
        parameters: T tensors.
        values: as many.
        places: swap places in memory and not contents, of tensors that are alone in theirs. What holds an address, as
            a CUDA graph or a view does, goes on seeing the other value.

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
    rows: list[tuple[Tensor, ...]] = []
    for _, p, x in pairs:
        rows += [(p, x)] if places and _may_move(p, x) else _pieces(p, x)
    all_or_none(_swap_places_ if places else _swap_, rows)
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


def _swap_places_(p: Tensor, x: Tensor) -> None:
    if not _may_move(p, x):
        _swap_(p, x)
        return
    p.data, x.data = x.data, p.data
    # Unlike a copy, an assignment to .data is hidden from autograd.
    torch.autograd.graph.increment_version((p, x))


def _may_move(p: Tensor, x: Tensor) -> bool:
    """Whether both are plain tensors on one device with the same strides, each alone in its memory."""
    plain = all(type(y) in (Tensor, nn.Parameter) and y._base is None for y in (p, x))
    return (
        plain
        and p.device == x.device
        and p.stride() == x.stride()
        and all(y.untyped_storage().nbytes() == y.numel() * y.element_size() for y in (p, x))
    )


def _pieces(p: Tensor, x: Tensor) -> list[tuple[Tensor, ...]]:
    """Views small enough that there is memory to swap them even after an exception for want of memory."""
    whole = all(type(y) in (Tensor, nn.Parameter) and y.is_contiguous() for y in (p, x))
    size = PIECE if p.device.type == "cpu" else PIECES_AT_ONCE * PIECE
    if p.numel() <= size or not whole:
        return [(p, x)]
    return list(zip(p.view(-1).split(size), x.view(-1).split(size), strict=True))


def forget_casts() -> None:
    """Drop the low-precision copies that autocast keeps: it does not see that a parameter was written to."""
    torch.clear_autocast_cache()

"""One call may run the text module several times: which of its passes the features are taken from.

A loss that distils from a teacher, compares with a blank picture or has a reference of its own does so. The pass that
is meant is the one that the loss's gradient goes through.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

Pass = Mapping[int, Tensor]
"""What one pass of the text module left, by place: hidden states of shape (batch, tokens, hidden)."""


@dataclass
class Known:
    """What calls of a model have shown of its text module.

    Attributes:
        several: whether one call may run it several times; None before the first whole call.
        stopped: whether a call has been ended after the first pass since the last whole one.
        other_kernels: whether a pass without gradients gives other numbers than one with them; None if not known.
    """

    several: bool | None = None
    stopped: bool = False
    other_kernels: bool | None = None


_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def known_of(text_module: nn.Module) -> Known:
    """What is known of a text module so far."""
    return _KNOWN.setdefault(text_module, Known())


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a model, or a function that runs it, has returned; None without one.

    A loss is the output itself, its ``loss``, or with ``return_dict=False`` the scalar that comes first.
    """
    if isinstance(output, Tensor):
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple | list) and output:
        first = output[0]
        loss = first if isinstance(first, Tensor) and first.dim() == 0 else None
    return loss


def meant(passes: Sequence[Pass], output: Any) -> int:
    """The index of the pass that carries the loss's gradient.

    Raises:
        RuntimeError: several carry it, or none.
    """
    if len(passes) == 1:
        return 0
    found = [i for i, one in enumerate(passes) if any(x.requires_grad for x in one.values())]
    loss = loss_of(output)
    if len(found) > 1 and loss is not None:
        found = carrying(loss, passes)
    if len(found) == 1:
        return found[0]
    if found:
        why = f"and the loss's gradient goes through {len(found)} of these passes"
    else:
        why = "and no pass carries a gradient"
    raise RuntimeError(
        f"VisualTap: the text module was run {len(passes)} times in one call, {why}, so it is not known which features "
        "are meant: run what is not about this batch's pictures under torch.no_grad(), or inside tap.aside()"
    )


def carrying(loss: Tensor, passes: Sequence[Pass]) -> list[int]:
    """Which passes a loss's autograd graph goes through, each by any of its places."""
    wanted: dict[Any, set[int]] = {}
    for i, one in enumerate(passes):
        for x in one.values():
            if x.grad_fn is not None:
                wanted.setdefault(x.grad_fn, set()).add(i)
    found, seen, left = set[int](), set[Any](), [loss.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= wanted.get(node, set())
        left += [following for following, _ in node.next_functions]
    return sorted(found)

"""Whether an optimizer treats every element of a parameter alike and apart: tried, not taken at its word."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_mdgd.kernels.exact import exact

# Beyond what optimizers of 8 bits keep in full, and in rows that no block size divides.
SHAPE = (61, 97)
# What clips a step by the size of a whole parameter or gradient does so at some of these and not at others.
SIZES = (1.0, 1 / 32)
GROWTH = (1.0, 4.0, 16.0, 0.25)
RATE = 1e-2
TOLERANCE = 1e-5


def require_elementwise(base: Optimizer) -> None:
    """Step a copy of the optimizer on a matrix, and on some of its elements as a vector; ``base`` is not touched.

    Raises:
        TypeError: what becomes of those elements differs, or the optimizer takes no vector, naming it.
    """
    name = type(base).__name__
    generator = torch.Generator(device="cpu").manual_seed(0)
    draws = [torch.randn(SHAPE, generator=generator, dtype=torch.float32, device="cpu") for _ in range(1 + len(GROWTH))]
    chosen = torch.arange(draws[0].numel(), dtype=torch.int64, device="cpu").view(SHAPE) % 7 == 0
    for group in base.param_groups:
        device = next((p.device for p in group["params"] if p.device.type != "meta"), torch.device("cpu"))
        draw, *rows = (x.to(device) for x in draws)
        gradients = [x * factor for x, factor in zip(rows, GROWTH, strict=True)]
        mask = chosen.to(device)
        for start in (draw * size for size in SIZES):
            try:
                with exact([device]), device:
                    matrix = _stepped(base, group, start, [x * mask for x in gradients], mask)
                    vector = _stepped(base, group, start[mask], [x[mask] for x in gradients], mask[mask])
            except Exception as error:
                raise TypeError(
                    f"compact=True gives {name} the selected elements of each parameter as a vector, which it does not "
                    f"take ({error}): use compact=False, the dense mode"
                ) from error
            apart = (matrix[mask] - vector).abs().max()
            if not bool(apart <= TOLERANCE * (start[mask] - vector).abs().max()):
                raise TypeError(
                    f"compact=True needs an optimizer that treats every element of a parameter alike and apart, which "
                    f"{name} does not: use compact=False, the dense mode"
                )


@torch.no_grad()
def _stepped(
    base: Optimizer, group: dict[str, Any], start: Tensor, gradients: Sequence[Tensor], mask: Tensor
) -> Tensor:
    """A parameter after some steps, of which only masked elements may move."""
    twin = object.__new__(type(base))
    # All that it has, which Optimizer's own way to copy leaves out; what it notes down goes into other containers.
    vars(twin).update({key: copy.copy(x) if isinstance(x, dict | list | set) else x for key, x in vars(base).items()})
    parameter = nn.Parameter(start.clone())
    twin.state = defaultdict(dict)
    settings = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
    twin.param_groups = [{**settings, "lr": RATE, "params": [parameter]}]
    vars(twin).update({key: OrderedDict() for key in vars(twin) if key.endswith("_hooks")})
    # Neither a scheduler's, which stands on the instance, nor the one that runs hooks of all optimizers.
    step: Any = getattr(type(base).step, "__wrapped__", type(base).step)
    mode: Any = getattr(twin, "train", None)
    if callable(mode):
        # That of schedule-free optimizers, without which they do not step.
        mode()
    with torch.random.fork_rng(devices=[]):
        for gradient in gradients:
            before = parameter.detach().clone()
            parameter.grad = gradient.clone()
            step(twin)
            parameter.copy_(torch.where(mask, parameter, before))
    return parameter.detach()

"""Every configuration in torch's own list of optimizers, bare and wrapped: prints what differs, a line for each.

A program of its own, as importing that list changes settings of the whole process.
"""

import copy
import io
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_mdgd import MDGD, MDGDOptimizer, StepProject

Wrap = Callable[[Any], Any]


def listed() -> list[Any]:
    # Needed to import the list, and not to read it.
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))  # type: ignore[arg-type]
    from torch.testing._internal.common_optimizers import optim_db

    return list(optim_db)


def configurations() -> Iterator[tuple[str, Callable[[list[nn.Parameter]], Any], bool]]:
    """A name, what makes the optimizer, and whether it maximises; of those that take dense gradients."""
    for info in listed():
        if info.only_supports_sparse_grads:
            continue
        for settings in info.optim_inputs_func(device="cpu"):
            for flag in ({}, {"foreach": True}, {"fused": True}):
                if not set(flag) <= set(info.supported_impls):
                    continue
                if flag.get("foreach") and isinstance(settings.kwargs.get("lr"), Tensor):
                    # Needs a device that captures graphs.
                    continue

                def make(parameters: list[nn.Parameter], info=info, settings=settings, flag=flag) -> Any:
                    return info.optim_cls(parameters, **copy.deepcopy(settings.kwargs), **flag)

                name = f"{info.optim_cls.__name__}, {settings.desc}, {''.join(flag) or 'plain'}"
                yield name, make, bool(settings.kwargs.get("maximize"))


def parameters_of(name: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (4, 4)] if name.startswith("Muon") else [(5, 4), (4,), (2, 1, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(parameters: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    return [torch.randn(p.shape, generator=generator) for p in parameters]


def step(optimizer: Any, parameters: list[nn.Parameter], number: int, captured: bool) -> None:
    g = gradients(parameters, number)
    if captured:
        optimizer.set_gradients(task=g, visual=[None] * len(g))
    else:
        for p, x in zip(parameters, g, strict=True):
            p.grad = x
    optimizer.step()
    optimizer.zero_grad()


def run(name: str, make: Callable[[list[nn.Parameter]], Any], wrap: Wrap, captured: bool) -> list[Tensor]:
    """Parameters after three steps, with a checkpoint before the last; in a file if something is captured."""
    parameters = parameters_of(name)
    optimizer = wrap(make(parameters))
    for number in (1, 2):
        step(optimizer, parameters, number, captured)
    parameters = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = wrap(make(parameters))
    state = copy.deepcopy(optimizer.state_dict())
    resumed.load_state_dict(through_a_file(state) if captured else state)
    step(resumed, parameters, 3, captured)
    return [p.detach() for p in parameters]


def through_a_file(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def differences(name: str, make: Callable[[list[nn.Parameter]], Any], maximize: bool) -> list[str]:
    if name.startswith("LBFGS"):
        return [] if raises(TypeError, lambda: MDGDOptimizer(make(parameters_of(name)))) else ["is not refused"]
    bare = run(name, make, lambda base: base, captured=False)
    if all(torch.equal(x, p) for x, p in zip(bare, parameters_of(name), strict=True)):
        return ["does not move"]
    rules: dict[str, Any] = {"MDGD": MDGD, "StepProject": StepProject}
    out = []
    if maximize:
        del rules["MDGD"]
        if not raises(ValueError, lambda: MDGDOptimizer(make(parameters_of(name)), MDGD())):
            out.append("is maximised, and not refused")
    for rule, kind in rules.items():
        # With nothing captured no rule has a say; step space alone would look at the moves.
        for captured in (False, True) if rule == "StepProject" else (True,):
            found = run(name, make, lambda base, kind=kind: MDGDOptimizer(base, kind()), captured)
            # The same operations on one machine.
            if not all(torch.equal(x, y) for x, y in zip(found, bare, strict=True)):
                out.append(f"differs with {rule}, {'d = g' if captured else 'nothing captured'}")
    return out


def raises(kind: type[Exception], call: Callable[[], Any]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def main() -> None:
    count = 0
    for name, make, maximize in configurations():
        count += 1
        for difference in differences(name, make, maximize):
            print(f"{name}: {difference}")
    print(f"{count} configurations")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

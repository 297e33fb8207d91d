"""LoRA that begins as nothing: the reference is the model without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

A, B = ".lora_A.", ".lora_B."


def matrices_from_nothing(model: nn.Module) -> dict[Tensor, bool] | None:
    """LoRA's trained matrices, if they are all that is trained, and the model as it stands is the model without them.

    Args:
        model: a PeftModel, also inside DistributedDataParallel or torch.compile.

    Returns:
        for each whether it is a B, all of which are zero; else None.
    """
    owner = _owner(model)
    configs = getattr(owner, "peft_config", {})
    if len(configs) != 1:
        return None
    found: dict[Tensor, bool] = {}
    names: set[str] = set()
    for name, p in model.named_parameters():
        if B in name and bool(p.detach().any()):
            return None
        if p.requires_grad:
            if A not in name and B not in name:
                return None
            found[p] = B in name
            names.add(name)
    # An A whose B is frozen is of another use.
    return found if names and all(name.replace(A, B) in names for name in names) else None


def can_be_left_out(model: nn.Module) -> bool:
    """Whether the pass without adapters draws the same random numbers: none of them has a dropout of its own."""
    owner = _owner(model)
    dropouts = [m for name, m in model.named_modules() if ".lora_dropout." in f"{name}."]
    return owner is not None and not any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in dropouts)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model runs without its adapters here; what requires gradients is as before afterwards."""
    owner = _owner(model)
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        with owner.disable_adapter():
            yield
    finally:
        # peft freezes all adapters, and lets all active ones be trained again.
        for p, flag in flags.items():
            p.requires_grad_(flag)


def _owner(model: nn.Module) -> Any:
    """The PeftModel; None if there is none."""
    inner: Any = model
    while inner is not None and not hasattr(inner, "disable_adapter"):
        ddp = isinstance(inner, nn.parallel.DistributedDataParallel)
        inner = inner.module if ddp else getattr(inner, "_orig_mod", None)
    return inner

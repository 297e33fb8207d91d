"""Our own arithmetic, whatever the caller has set."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def exact(devices: Iterable[torch.device]) -> Iterator[None]:
    """Inside, no autocast of these devices lowers a precision, and float32 products are float32's and not TF32's."""
    matmul: Any = torch.backends.cuda.matmul
    kinds = {device.type for device in devices} - {"meta"}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "cuda" in kinds:
            stack.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
            matmul.fp32_precision = "ieee"
        yield

"""Our own arithmetic, whatever the caller has set."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def exact(devices: Iterable[torch.device]) -> Iterator[None]:
    """Inside, no autocast of these devices lowers a precision, and float32 products are float32's own.

    On the GPU they may otherwise be TF32's. On CPUs with such instructions they may be bfloat16's.
    """
    kinds = {device.type for device in devices} - {"meta"}
    backends: Any = torch.backends
    products = {"cuda": backends.cuda.matmul, "cpu": backends.mkldnn.matmul}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for matmul in (products[kind] for kind in kinds & products.keys()):
            stack.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
            matmul.fp32_precision = "ieee"
        yield

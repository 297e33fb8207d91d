"""Bytes that the kernels move for each number, and what that takes at a GPU's bandwidth: computed, not measured.

The bytes are counted in the calls that an optimizer really makes; the time is bytes over bandwidth, as if nothing else
cost any. A kernel reads each tensor of a call once, whatever it computes of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks import figures
from benchmarks.report import Goal, Section, Table
from benchmarks.settings import Settings
from benchmarks.setups import Captured, gradients, llava
from benchmarks.timing import Ratio, digits
from torch_mdgd import Project, TopK, kernels

# Bytes a second that NVIDIA's data sheets name.
GPUS = {"A100 80 GB SXM": 2.039e12, "H100 SXM": 3.35e12}
# What LLaVA-1.5-7B trains.
TRAINED = 1_235_279_872
# A float64 key has 64 bits of which a pass settles 11; then one pass for the ties and one that writes the mask.
PASSES_OF_TOP_K = 6 + 2
UPDATES: dict[str, dict[str, Any]] = {
    "MDGD, (6)-(9)": {},
    "MDGD, project": {"rule": Project()},
    "MDGD-GM, the step that chooses the mask": {"mask": TopK(0.1)},
    "MDGD-GM, later steps": {"mask": TopK(0.1)},
}


class Traffic:
    """Bytes read and written by kernels since it was made."""

    def __init__(self) -> None:
        self.bytes = 0

    def add(self, *lists: Sequence[Tensor | None], times: int = 1) -> None:
        """Count each distinct tensor once."""
        found = {x.data_ptr(): x.numel() * x.element_size() for tensors in lists for x in tensors if x is not None}
        self.bytes += times * sum(found.values())


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what the kernels called inside move; they compute as ever."""
    traffic = Traffic()
    products, combine_, top_k = kernels.inner_products, kernels.combine_, kernels.top_k_similarity_masks

    def counted_products(rows: Any, columns: Any = None) -> Tensor:
        traffic.add(*rows, *(columns or ()))
        return products(rows, columns)

    def counted_combine_(out: Any, gradients: Any, coefficients: Tensor, masks: Any = None) -> None:
        traffic.add(*gradients, masks or ())
        traffic.add(out)
        combine_(out, gradients, coefficients, masks)

    def counted_top_k(g: Any, v: Any, g0: Any, *rest: Any) -> list[Tensor | None]:
        masks = top_k(g, v, g0, *rest)
        traffic.add(g, v, g0, times=PASSES_OF_TOP_K)
        traffic.add(masks)
        return masks

    replaced = {
        "inner_products": counted_products,
        "combine_": counted_combine_,
        "top_k_similarity_masks": counted_top_k,
    }
    for name, function in replaced.items():
        setattr(kernels, name, function)
    try:
        yield traffic
    finally:
        for name, function in zip(replaced, (products, combine_, top_k), strict=True):
            setattr(kernels, name, function)


def bytes_per_value(name: str, dtype: torch.dtype, divide: int) -> float:
    """What one combine of this update moves for each number of LLaVA's list of tensors."""
    update = Captured(gradients(llava(divide), dtype), **UPDATES[name])
    if name.endswith("later steps"):
        update.prepare()
        update.combine()
    update.prepare()
    with counted() as traffic:
        update.combine()
    return traffic.bytes / sum(p.numel() for p in update.optimizer.parameters)


def section(settings: Settings) -> Section:
    """Count the bytes of every update."""
    rows, series = [], {}
    found = {}
    for name in UPDATES:
        for dtype in (torch.float32, torch.bfloat16):
            moved = found[name, dtype] = bytes_per_value(name, dtype, max(settings.divide, 32))
            kind = str(dtype).removeprefix("torch.")
            milliseconds = {gpu: 1000 * moved * TRAINED / speed for gpu, speed in GPUS.items()}
            rows.append((f"{name}, {kind}", digits(moved), *(digits(ms) for ms in milliseconds.values())))
            series[f"{name}, {kind}"] = milliseconds
    table = Table(
        f"Computed: bytes for each number, and milliseconds for {TRAINED:,} numbers",
        ("update", "bytes", *GPUS),
        rows,
        [f"{gpu}: {speed / 1e12:g} TB/s. Not measured." for gpu, speed in GPUS.items()],
    )
    # g~0 costs reading g0 and v0 twice and writing once; then g, v and g~0 twice, and d.
    goal = Goal(
        "MDGD, (6)-(9), float32: bytes for each number", 12 * 4, found["MDGD, (6)-(9)", torch.float32], unit="B"
    )
    bars = {gpu: {name: _exactly(values[gpu]) for name, values in series.items()} for gpu in GPUS}
    figure = figures.bars("Time at the full bandwidth, computed", "ms", bars, log=False)
    return Section("bandwidth", "Bytes moved", _about(), [table], [goal], figure)


def _about() -> str:
    return (
        "Bytes that `combine()` makes the kernels read and write, counted in its calls, and the time that they take at "
        "a GPU's bandwidth. Computed, not measured; the wrapped optimizer's own step is not in it."
    )


def _exactly(value: float) -> Ratio:
    return Ratio(value, value, value)

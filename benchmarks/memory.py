"""Memory in bytes of one training step of each method, measured; and of two published models, computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks import allocation, figures
from benchmarks.language_model import Training, build
from benchmarks.methods import COMPACT, FRACTION, METHODS, PLAIN, SHIRA, Method
from benchmarks.report import Goal, Section, Table
from benchmarks.settings import Settings
from benchmarks.setups import Shape, count, llava, minicpm
from benchmarks.timing import digits, threads
from torch_mdgd import MDGDOptimizer

MODELS = {"LLaVA-1.5-7B": llava, "MiniCPM-V-2.0": minicpm}
HELD = ("parameters", "gradients", "reference", "optimizer state", "masks, positions")
SHARE = "reference, state, masks against AdamW's state"
MEASURED = ("method", *HELD, "update", "first step", "later steps", SHARE)
COMPUTED = ("method", *HELD, SHARE)


@dataclass(frozen=True)
class Bytes:
    """What a method holds: gradients when the last backward pass is over, the rest between two steps.

    Args:
        parameters: all of the model's, an adapter's among them.
        gradients: of every kind that is alive when the update begins.
        reference: φ, and whatever else holds floating-point numbers.
        state: the optimizer's.
        masks: masks and positions: what holds bool and integer numbers.
    """

    parameters: int
    gradients: int
    reference: int
    state: int
    masks: int

    @property
    def extra(self) -> int:
        """What stays between two steps, the parameters aside."""
        return self.reference + self.state + self.masks


@dataclass(frozen=True)
class Measured:
    """Bytes held, and what the allocator had given out at its worst moments.

    Args:
        held: by category.
        update: gradients and all that combining them and stepping allocates.
        first: everything, in the first training step.
        later: everything, in the third.
    """

    held: Bytes
    update: int
    first: int
    later: int


def measure(method: Method, settings: Settings) -> Measured:
    """Train a few steps and count the storages of live tensors around one of them."""
    with allocation.fresh():
        return _measure(build(method, settings))


def _measure(training: Training) -> Measured:
    optimizer = training.optimizer
    parameters = list(training.model.parameters())
    known = [*parameters, *training.model.buffers(), *training.batch.values()]

    def others(*, floating: bool) -> int:
        skipped = allocation.storages([*known, *_state(optimizer)])
        tensors = [x for x in allocation.live() if x.is_floating_point() == floating]
        return sum(size for at, size in allocation.storages(tensors).items() if at not in skipped)

    size = sum(allocation.storages(parameters).values())
    start = size + others(floating=True) + others(floating=False)
    first = start + allocation.peak(training.step)
    training.step()
    state = sum(allocation.storages(_state(optimizer)).values())
    reference, masks = others(floating=True), others(floating=False)

    gradients, peaks = [], []

    def watch(update: Callable[[], object]) -> None:
        gradients.append(others(floating=True) - reference)
        peaks.append(gradients[-1] + allocation.peak(update))

    if isinstance(optimizer, MDGDOptimizer):
        with patch.object(optimizer, "combine", partial(watch, optimizer.combine)):
            training.backward()
    else:
        training.backward()
    watch(optimizer.step)
    optimizer.zero_grad()
    held = Bytes(size, gradients[0], reference, state, masks)
    return Measured(held, max(peaks), first, size + held.extra + allocation.peak(training.step))


def _state(optimizer: Optimizer) -> list[Tensor]:
    return allocation.tensors_in(list(optimizer.state.values()))


def computed(method: Method, shapes: Sequence[Shape]) -> Bytes:
    """The same for parameters of these shapes, from tensors on the meta device; AdamW makes its state there."""
    plan = method.plan
    few: Sequence[Shape] = [(round(FRACTION * count(shapes)),)]
    trained = few if method.adapter is not None else shapes
    kept = few if plan.sparse else trained

    def size(shapes: Sequence[Shape], dtype: torch.dtype = torch.float32) -> int:
        return sum(allocation.storages(torch.empty(s, dtype=dtype, device="meta") for s in shapes).values())

    optimizer = torch.optim.AdamW([torch.empty(s, device="meta", requires_grad=True) for s in kept])
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    optimizer.step()
    masks, dtype = plan.masks
    return Bytes(
        parameters=size(shapes) + (size(few) if method.adapter is not None else 0),
        gradients=plan.gradients * size(trained),
        reference=plan.reference * size(kept),
        state=sum(allocation.storages(_state(optimizer)).values()),
        masks=masks * size(kept, dtype),
    )


def section(settings: Settings) -> Section:
    """Measure every installed method on the small model, and compute it for the published ones."""
    with threads(1):  # each thread has scratch of its own
        measured = {method: measure(method, settings) for method in METHODS if method.installed}
    adamw = measured[PLAIN].held.state
    unit = 1e6
    rows: list[Sequence[str]] = []
    for method in METHODS:
        if method not in measured:
            rows.append((method.name, "not installed", *[""] * (len(MEASURED) - 2)))
            continue
        found = measured[method]
        cells = [*vars(found.held).values(), found.update, found.first, found.later]
        rows.append((method.name, *(digits(x / unit) for x in cells), f"{found.held.extra / adamw:.0%}"))
    tables = [
        Table(
            f"Measured, MB, on a Llama of {measured[PLAIN].held.parameters // 4:,} float32 numbers",
            MEASURED,
            rows,
            [
                "Gradients: all kinds alive when the last backward pass is over. Update: the most that gradients and "
                "temporaries of combining and stepping came to. First and later: the most memory in use in the first "
                "and in a later training step, parameters and activations included.",
            ],
        )
    ]
    for name, shapes in MODELS.items():
        sizes = {method: computed(method, shapes()) for method in METHODS}
        state = sizes[PLAIN].state
        tables.append(
            Table(
                f"Computed on the meta device, GB, for the {count(shapes()):,} trained numbers of {name}",
                COMPUTED,
                [
                    (method.name, *(digits(x / 1e9) for x in vars(held).values()), f"{held.extra / state:.0%}")
                    for method, held in sizes.items()
                ],
                ["float32; not measured. Frozen parameters are not counted."],
            )
        )
    plain = measured[PLAIN].held
    goals = []
    for method in METHODS:
        if method.wraps:
            # Scratch of fixed size comes on top: large beside this model's gradients, not beside a real one's.
            what = f"{method.name}: peak of the update, in whole buffers of the gradient's size"
            goals.append(Goal(what, 3, round(measured[method].update / plain.gradients), unit=""))
    for method in COMPACT:
        found = measured[method]
        what = f"{method.name}: state, reference and positions, against AdamW's state"
        goals.append(Goal(what, 0.25, found.held.extra / plain.state))
        shira = found.later / measured[SHIRA].later if SHIRA in measured else None
        goals.append(Goal(f"{method.name}: later steps, against SHiRA", 1, shira))
        first = (found.first - found.held.parameters) / (plain.parameters / 4)
        what = f"{method.name}: first step beyond the weights, for each trained number"
        goals.append(Goal(what, 14, first, unit="bytes"))
    about = (
        f"One training step with AdamW(fused). LoRA, SHiRA and the mask train {FRACTION:.0%} of the model's numbers. "
        "Held bytes are storages of live tensors, counted around a real step; peaks are what the allocator reported."
    )
    parts = {method.name: {k: x / unit for k, x in vars(found.held).items()} for method, found in measured.items()}
    figure = figures.stacks("Memory by method", "MB", parts)
    return Section("memory", "Memory", about, tables, goals, figure)

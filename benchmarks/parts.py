"""Where the update's time goes, and what faster inner products would cost in digits."""

import torch
from torch import Tensor

from benchmarks import figures
from benchmarks.report import Goal, Section, Table, mega
from benchmarks.settings import Settings
from benchmarks.setups import gradients
from benchmarks.timing import NOTE, Contender, copy_of, ratio, threads
from torch_mdgd import kernels

PRODUCTS, DOTS, READ = "the 6 of g, v and g~0", "the same by torch.dot", "reading one vector: torch.sum"
OPERATIONS = (
    "⟨g0, v0⟩ and ⟨v0, v0⟩",
    "g~0 = g0 − b v0, in place",
    PRODUCTS,
    "d = g + αv + βc g~0, in place",
    DOTS,
    READ,
)
PAIRS = [(i, j) for i in range(3) for j in range(i, 3)]


def dots(vectors: list[Tensor]) -> list[Tensor]:
    """The six inner products, each by one call on whole float32 vectors."""
    return [torch.dot(vectors[i], vectors[j]) for i, j in PAIRS]


def contenders(n: int) -> list[Contender]:
    """Each operation of (6)-(9) on vectors of n numbers, by itself, the six products by ``torch.dot``, and a read."""
    g, v, g0, v0 = (tensors[0] for tensors in gradients([(n,)]).values())
    little = torch.tensor([[1.0, 1e-9, 1e-9]], dtype=torch.float64)
    calls = (
        lambda: kernels.inner_products([[g0], [v0]], [[v0]]),
        lambda: kernels.combine_([g0], [[g0], [v0]], little[:, :2]),
        lambda: kernels.inner_products([[g], [v], [g0]]),
        lambda: kernels.combine_([g], [[g], [v], [g0]], little),
        lambda: dots([g, v, g0]),
        lambda: torch.sum(g),
    )
    return [copy_of(n), *(Contender(name, call) for name, call in zip(OPERATIONS, calls, strict=True))]


def errors(n: int) -> dict[str, float]:
    """Relative error of ⟨x, x⟩ where all n numbers of x are 0.1."""
    x = torch.full((n,), 0.1)
    exact = n * float(x[0].double()) ** 2
    found = {PRODUCTS: float(kernels.inner_products([[x]])), DOTS: float(torch.dot(x, x))}
    return {name: abs(value - exact) / exact for name, value in found.items()}


def section(settings: Settings) -> Section:
    """Time every operation alone on one thread."""
    with threads(1):
        times = settings.race(contenders(settings.values))
        wrong = errors(settings.values)
    measured = {name: ratio(times, name) for name in OPERATIONS}
    rows = [(name, str(x), f"{wrong[name]:.1e}" if name in wrong else "") for name, x in measured.items()]
    columns = ("operation", "copies, 1 thread", "relative error on equal numbers")
    table = Table(f"{mega(settings.values)} float32 numbers", columns, rows, [NOTE])
    goal = Goal("six inner products: relative error on equal numbers", 1e-6, wrong[PRODUCTS], unit="")
    about = (
        "The four kernel calls of (6)-(9), each alone; their sum is the update's time. What they have to move takes "
        "2/3, 1, 1 and 4/3 of a copy, which reads what it overwrites too. torch.dot is one call a pair, on whole "
        "vectors, with running float32 sums."
    )
    figure = figures.bars("Parts of the update", "copies", {"1 thread": measured}, log=False)
    return Section("parts", "Where the update's time goes", about, [table], [goal], figure)

"""``python -m benchmarks gpu``: checks and tables on a CUDA device.

It needs torch, triton and transformers, and nothing else. It writes ``gpu-DEVICE.json`` and ``gpu-DEVICE.md``.
``--small`` makes everything tiny and runs on the CPU too, to see that it runs: what it prints then says nothing about
speed.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.llama import batch_of, llama
from benchmarks.timing import Contender, Times, digits, interleave, median_ratio, ratio
from torch_mdgd import (
    MDGD,
    Anchor,
    DriftBudget,
    MDGDOptimizer,
    Project,
    ProtectInputs,
    StepProject,
    TopK,
    kernels,
    mdgd_backward,
)
from torch_mdgd.kernels import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPY = "copy"
EVERY = 8


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Args:
        lengths: of the tensors of lists that are checked: shorter and longer than a tile of a kernel, and no multiple.
        values: numbers in the vectors whose passes are timed.
        scores: numbers that the mask is chosen from.
        hidden, layers, heads, vocabulary: of the Llama that is trained.
        rows, tokens: of a batch.
        steps: how many training steps are timed of each way.
        rounds, seconds: of every other comparison.
    """

    lengths: tuple[tuple[int, ...], ...] = ((1,), (5, 3, 0, 7), (2048, 2049, 100_003), (1 << 20, 17, 77_777))
    values: int = 1 << 27
    scores: int = 100_000_000
    hidden: int = 2048
    layers: int = 8
    heads: int = 16
    vocabulary: int = 32_000
    rows: int = 4
    tokens: int = 512
    steps: int = 8
    rounds: int = 5
    seconds: float = 1.0


SMALL = Size(
    lengths=((1,), (5, 3, 0, 7), (2048, 2049, 70_003)), values=50_000, scores=100_000,
    hidden=32, layers=1, heads=4, vocabulary=512, rows=2, tokens=16, steps=2, rounds=2, seconds=0.0,
)  # fmt: skip


@dataclass
class Page:
    """What was found: lines of tables, goals with what was reached, and whether all checks held."""

    device: str
    versions: dict[str, str]
    measured: bool
    seconds: float = 0.0
    checks: list[dict[str, Any]] = field(default_factory=list)
    bandwidth: list[dict[str, Any]] = field(default_factory=list)
    mask: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)

    def goal(self, what: str, limit: str, reached: float, met: bool) -> None:
        self.goals.append({"what": what, "goal": limit, "reached": digits(reached), "met": met})

    def markdown(self) -> str:
        """All tables."""
        lines = [f"# {self.device}", "", ", ".join(f"{k} {v}" for k, v in self.versions.items()) + "."]
        lines += ["", f"`python -m benchmarks gpu`, {self.seconds:.0f} s."]
        if not self.measured:
            lines += ["", "Made tiny, to see that it runs: **not a measurement**."]
        titles = {
            "checks": "Kernels against the float64 oracle",
            "bandwidth": "Kernels: part of the device's copy bandwidth",
            "mask": "Exact top 10 % mask",
            "training": "A training step of a Llama in bfloat16, in steps of plain fine-tuning",
            "goals": "Goals",
        }
        for name, title in titles.items():
            rows: list[dict[str, Any]] = getattr(self, name)
            lines += ["", f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
            lines += ["| " + " | ".join(str(x) for x in row.values()) + " |" for row in rows]
        return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------------


def checks(size: Size, device: torch.device) -> Iterator[dict[str, Any]]:
    """Every operation on lists of every dtype, on the device, against float64 on the CPU."""
    for dtype in DTYPES:
        worst = {"inner_products": 0.0, "combine_": 0.0, "masks": 0.0, "similarity masks": 0.0}
        for seed, lengths in enumerate(size.lengths):
            generator = torch.Generator().manual_seed(seed)
            here = [[torch.randn(n, generator=generator).to(dtype) for n in lengths] for _ in range(3)]
            there = [[x.to(device) for x in vector] for vector in here]
            c = torch.randn(len(lengths), 3, generator=generator, dtype=torch.float64)
            k = max(1, sum(lengths) // 10)
            norms = torch.tensor([[float(x.double().norm()) for x in xs] for xs in zip(*here, strict=True)])
            error = (kernels.inner_products(there).cpu() - oracle.inner_products(here, here)).abs()
            bound = (norms[:, :, None] * norms[:, None, :]).clamp(min=1e-30)
            _note(worst, "inner_products", float((error / bound).max()) / 1e-6)
            for mine, right in zip(kernels.top_k_masks(there[0], k), oracle.top_k_masks(here[0], k), strict=True):
                _note(worst, "masks", float((mine.cpu() != right).sum()))
            for one, other in zip(
                kernels.top_k_similarity_masks(*there, c[:, 0].to(device), k),
                oracle.top_k_similarity_masks(*here, c[:, 0], k),
                strict=True,
            ):
                assert one is not None
                assert other is not None
                _note(worst, "similarity masks", float((one.cpu() != other).sum()))
            wanted = [x.double() for x in here[0]]
            oracle.combine_(wanted, here, c)
            kernels.combine_(there[0], there, c.to(device))
            for x, y in zip(there[0], wanted, strict=True):
                allowed = torch.finfo(dtype).eps * y.abs() + 1e-5
                if len(y):
                    _note(worst, "combine_", float(((x.cpu().double() - y).abs() / allowed).max()))
        for name, value in worst.items():
            yield {
                "operation": name,
                "dtype": str(dtype).removeprefix("torch."),
                "worst, of what is allowed": digits(value),
                "holds": value <= (0 if "masks" in name else 1),
            }


def _note(worst: dict[str, float], name: str, value: float) -> None:
    # NaN is the worst of all, and stays.
    worst[name] = value if value > worst[name] or value != value else worst[name]


def passes(n: int, dtype: torch.dtype, device: torch.device) -> list[tuple[str, int, Callable[[], object]]]:
    """(name, bytes that have to be moved, call) of every kernel on vectors of n numbers."""
    g, v, g0 = ([torch.randn(n, device=device, dtype=torch.float32).to(dtype)] for _ in range(3))
    mask: list[Tensor | None] = [torch.rand(n, device=device) < 0.1]
    c = torch.tensor([[1.0, 1e-9, 1e-9]], dtype=torch.float64, device=device)
    one = n * g[0].element_size()
    return [
        ("2 inner products of g, v", 2 * one, lambda: kernels.inner_products([g, v], [v])),
        ("6 inner products of g, v, g0", 3 * one, lambda: kernels.inner_products([g, v, g0])),
        ("g = g + a v", 3 * one, lambda: kernels.combine_(g, [g, v], c[:, :2])),
        ("g = g + a v + b g0", 4 * one, lambda: kernels.combine_(g, [g, v, g0], c)),
        ("g = M (g + a v)", 3 * one + n, lambda: kernels.combine_(g, [g, v], c[:, :2], mask)),
    ]


def bandwidth(size: Size, device: torch.device) -> Iterator[dict[str, Any]]:
    """Bytes that have to be moved over the time of each kernel, and the same of a copy."""
    for dtype in (torch.float32, torch.bfloat16):
        rows = passes(size.values, dtype, device)
        x = torch.ones(size.values, device=device, dtype=dtype)
        out = torch.empty_like(x)
        copy = Contender(COPY, partial(out.copy_, x))
        times = _race(size, device, [copy, *(Contender(name, call) for name, _, call in rows)])
        copied = 2 * x.nbytes / statistics.median(times[COPY])
        for name, moved, _ in [(COPY, 2 * x.nbytes, None), *rows]:
            speed = moved / statistics.median(times[name])
            yield {
                "kernel": name,
                "dtype": str(dtype).removeprefix("torch."),
                "GB/s": digits(speed / 1e9),
                "of a copy's": f"{speed / copied:.0%}",
            }
        del rows, copy, x, out
        _free(device)


def masks(size: Size, device: torch.device) -> Times:
    """Times of the mask beside ``torch.topk``, up to the finished mask."""
    n, k = size.scores, size.scores // 10
    scores = torch.randn(n, device=device)

    def by_topk() -> Tensor:
        mask = torch.zeros(n, dtype=torch.bool, device=device)
        mask[torch.topk(scores, k, sorted=False).indices] = True
        return mask

    out = torch.empty_like(scores)
    return _race(
        size,
        device,
        [
            Contender(COPY, lambda: out.copy_(scores)),
            Contender("torch_mdgd", lambda: kernels.top_k_masks([scores], k)),
            Contender("torch.topk", by_topk),
        ],
    )


# ----------------------------------------------------------------------------------------------------------------------


def ways() -> dict[str, Callable[[nn.Module, Optimizer], Optimizer]]:
    """By name, what makes the optimizer of a way to fine-tune from a model and plain AdamW."""
    wrap = MDGDOptimizer
    return {
        "plain fine-tuning": lambda model, base: base,
        "αv, one backward pass": lambda model, base: wrap(base, MDGD(regularize=0)),
        f"αv, every {EVERY}th step": lambda model, base: wrap(base, MDGD(regularize=0, every=EVERY)),
        "published": lambda model, base: wrap(base, MDGD()),
        "MDGD-GM": lambda model, base: wrap(base, MDGD(), mask=TopK(0.1)),
        "MDGD-GM, compact": lambda model, base: wrap(base, MDGD(), mask=TopK(0.1), compact=True),
        "Project": lambda model, base: wrap(base, Project()),
        "StepProject": lambda model, base: wrap(base, StepProject()),
        "ProtectInputs": lambda model, base: wrap(base, ProtectInputs(model)),
        "DriftBudget": lambda model, base: wrap(base, DriftBudget(MDGD(regularize=0), 0.05)),
        "Anchor": lambda model, base: wrap(base, Anchor(model, warmup=1)),
    }


def training(size: Size, device: torch.device) -> Iterator[dict[str, Any]]:
    """Median time of a step after the first two, peak memory of those steps, beside plain fine-tuning's."""
    plain: dict[str, float] = {}
    for name, make in ways().items():
        torch.manual_seed(0)
        model = llama(size.hidden, size.layers, size.vocabulary, size.tokens, size.heads).to(device, torch.bfloat16)
        batch = {key: x.to(device) for key, x in batch_of(size.rows, size.tokens, size.vocabulary).items()}
        optimizer = make(model, AdamW(model.parameters(), lr=1e-5, fused=True))
        step = partial(_step, model, optimizer, batch)
        # The second makes what the first could not, as a mask or an anchor's directions.
        first = _timed(step, device)
        step()
        _reset_peak(device)
        # A whole round of what comes every 8th step.
        each = [_timed(step, device) for _ in range(max(size.steps, EVERY) if "every" in name else size.steps)]
        took = statistics.mean(each) if "every" in name else statistics.median(each)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        plain = plain or {"took": took, "peak": peak}
        yield {
            "way": name,
            "trained numbers": f"{sum(p.numel() for p in model.parameters()):,}",
            "ms": digits(1e3 * took),
            "steps": digits(took / plain["took"]),
            "first step, ms": digits(1e3 * first),
            "peak, GB": digits(peak / 1e9) if peak else "not measured",
            "of plain's": f"{peak / plain['peak']:.2f}" if peak else "not measured",
        }
        del model, optimizer, batch, step
        _free(device)


def _step(model: nn.Module, optimizer: Optimizer, batch: dict[str, Tensor]) -> None:
    if isinstance(optimizer, MDGDOptimizer):
        mdgd_backward(model, optimizer, batch)
    else:
        model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------------------------------


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _timed(run: Callable[[], object], device: torch.device) -> float:
    start = _clock(device)
    run()
    return _clock(device) - start


def _race(size: Size, device: torch.device, contenders: Sequence[Contender]) -> Times:
    return interleave(contenders, rounds=size.rounds, seconds=size.seconds, clock=partial(_clock, device))


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def _said(what: str) -> Iterator[None]:
    start = time.perf_counter()
    print(f"{what} ...", end=" ", flush=True)
    yield
    print(f"{time.perf_counter() - start:.0f} s", flush=True)


def measure(size: Size, device: torch.device) -> Page:
    """Everything, in order."""
    start = time.perf_counter()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    page = Page(name, _versions(), measured=size is not SMALL)
    with _said("checks"):
        page.checks = list(checks(size, device))
    with _said("bandwidth"):
        page.bandwidth = list(bandwidth(size, device))
    with _said("mask"):
        times = masks(size, device)
        page.mask = [
            {"mask": name, "ms": digits(1e3 * statistics.median(times[name])), "copies": str(ratio(times, name))}
            for name in times
        ]
    _free(device)
    with _said("training"):
        page.training = list(training(size, device))
    _goals(page, times)
    page.seconds = time.perf_counter() - start
    return page


def _goals(page: Page, times: Times) -> None:
    part = {(row["kernel"], row["dtype"]): float(row["of a copy's"].rstrip("%")) for row in page.bandwidth}
    for dtype in ("float32", "bfloat16"):
        found = part["g = g + a v + b g0", dtype]
        page.goal(f"combination in {dtype}, % of a copy's bandwidth", "≥ 80", found, found >= 80)
    faster = median_ratio(times, "torch.topk", "torch_mdgd") or 0.0
    page.goal("mask, times faster than torch.topk", "≥ 10", faster, faster >= 10)
    steps = {row["way"]: float(row["steps"].replace(",", "")) for row in page.training}
    for name, limit in {
        "αv, one backward pass": 1.35,
        f"αv, every {EVERY}th step": 1.1,
        "published": 3.4,
        "Anchor": 1.05,
    }.items():
        page.goal(f"{name}, steps of plain fine-tuning", f"≤ {limit}", steps[name], steps[name] <= limit)


def _versions() -> dict[str, str]:
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import triton
    except ImportError:
        return found
    return {**found, "triton": triton.__version__}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny, also on the CPU, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where results are written")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.small:
        parser.error("there is no CUDA device here; --small runs on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    page = measure(SMALL if options.small else Size(), device)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu-{page.device.lower().replace(' ', '-')}"
    path.with_name(f"{path.name}.json").write_text(json.dumps(asdict(page), indent=1) + "\n", encoding="utf-8")
    path.with_name(f"{path.name}.md").write_text(page.markdown(), encoding="utf-8")
    print(page.markdown())
    failed = [f"{row['operation']} in {row['dtype']}" for row in page.checks if not row["holds"]]
    if failed:
        raise SystemExit(f"kernels differ from the oracle: {', '.join(failed)}")

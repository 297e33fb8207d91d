"""Interleaved timing: every contender meets the same noise, and only ratios within one process are reported."""

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
COPY = "copy"
# Seconds for one run of a rival; the library's own rows are never left out.
PATIENCE = 5.0
NOTE = f"Median and quartiles. Left out: a rival that took over {PATIENCE:g} s for one run, or failed."


def _nothing() -> None: ...


@dataclass(frozen=True)
class Contender:
    """One row of a comparison.

    Args:
        name: as printed.
        run: what is timed; its result is freed outside the timing.
        prepare: runs before every ``run``, untimed.
        limit: of a rival, in seconds. If its warm-up takes longer, or fails, it is left out.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing
    limit: float | None = None


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of single rounds: of ratios, or of :func:`over`."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{digits(self.median)} ({digits(self.low)}–{digits(self.high)})"


Times = dict[str, list[float]]


class Races:
    """The rounds of a section's comparisons, which grow lap by lap.

    A run goes through its sections several times, each time through the same comparisons in the same order, with
    everything made anew. Quartiles then hold what drifts over minutes and what depends on where a vector lies in
    memory, as they differ between two runs.
    """

    def __init__(self) -> None:
        self._pooled: list[Times] = []
        self._next = 0

    def begin(self) -> None:
        """The next comparison is the section's first again."""
        self._next = 0

    def add(self, times: Times) -> Times:
        """These rounds behind those of earlier laps, without what was left out of one of them.

        Raises:
            ValueError: earlier laps compared something else here.
        """
        if self._next == len(self._pooled):
            self._pooled.append(times)
        else:
            before = self._pooled[self._next]
            if not before.keys() & times.keys():
                raise ValueError(f"races: {list(times)} do not continue {list(before)}")
            self._pooled[self._next] = {name: before[name] + times[name] for name in before if name in times}
        self._next += 1
        return self._pooled[self._next - 1]


def copy_of(n: int) -> Contender:
    """The unit: ``out.copy_(x)`` of n float32 values."""
    x, out = torch.ones(n), torch.zeros(n)
    return Contender(COPY, lambda: out.copy_(x))


def interleave(
    contenders: Sequence[Contender],
    *,
    rounds: int = 7,
    seconds: float = 0.0,
    warm: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Times of A B C A B C ..., after one warm-up of each, without garbage collection in between.

    Args:
        contenders: with distinct names.
        rounds: at least so many.
        seconds: more rounds until the timed parts add up to this, at most 20 times ``rounds``.
        warm: they have been warmed up already.
        clock: seconds.

    Returns:
        seconds of every round by name, without the contenders that were left out.

    Raises:
        ValueError: two contenders have one name.
    """
    names = [c.name for c in contenders]
    if len(set(names)) < len(names):
        raise ValueError(f"interleave: contenders must have distinct names, got {names}")
    with _collected():
        staying = [c for c in contenders if warm or _warm_up(c, clock)]
        times: Times = {c.name: [] for c in staying}
        done = 0
        while staying and (done < rounds or (done < 20 * rounds and sum(map(sum, times.values())) < seconds)):
            for c in staying:
                times[c.name].append(_time(c, clock))
            done += 1
    return times


def ratio(times: Times, name: str, unit: str = COPY) -> Ratio | None:
    """How many ``unit`` one ``name`` takes, round by round; None if either was left out."""
    if name not in times or unit not in times:
        return None
    return quartiles([a / b for a, b in zip(times[name], times[unit], strict=True)])


def over(times: Times, name: str, unit: str) -> Ratio:
    """How many milliseconds longer than ``unit`` it takes, round by round."""
    return quartiles([1e3 * (a - b) for a, b in zip(times[name], times[unit], strict=True)])


def quartiles(values: Sequence[float]) -> Ratio:
    """Of the numbers of single rounds; a lone one is all three."""
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(statistics.median(values), low, high)


def median_ratio(times: Times, name: str, unit: str = COPY) -> float | None:
    """The median of :func:`ratio`."""
    found = ratio(times, name, unit)
    return None if found is None else found.median


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use this many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _collected() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _warm_up(contender: Contender, clock: Callable[[], float]) -> bool:
    if contender.limit is None:
        _time(contender, clock)
        return True
    try:
        return _time(contender, clock) <= contender.limit
    except Exception as error:
        warnings.warn(f"{contender.name} is left out: {error}", stacklevel=2)
        return False


def _time(contender: Contender, clock: Callable[[], float]) -> float:
    contender.prepare()
    start = clock()
    result = contender.run()
    elapsed = clock() - start
    del result
    return elapsed

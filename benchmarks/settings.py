"""How large, how often, on how many threads."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.timing import Contender, Races, Times, interleave, threads

M = 1_000_000


@dataclass(frozen=True)
class Settings:
    """One run of the benchmarks.

    Args:
        values: numbers in the vectors of most tables.
        few: numbers in the vectors of peers that take a hundred copies.
        sweep: sizes at which the update and the mask are timed.
        fractions: kept fractions at which the mask is timed.
        divide: by what the widths of LLaVA are divided in the list of its shapes.
        hidden: width of the small language model that is trained.
        layers: its depth.
        laps: how often the whole is gone through.
        rounds: at least so many rounds of every comparison in a lap.
        seconds: and more of them until a comparison has taken this long.
        threads: thread counts of torch; tables with one count use the last.
        races: what earlier laps of the section have measured; None for a lone one.
    """

    values: int = 16 * M
    few: int = 2 * M
    sweep: tuple[int, ...] = tuple(M << i for i in (0, 2, 4, 6, 8))
    fractions: tuple[float, ...] = (0.01, 0.10, 0.50)
    divide: int = 8
    hidden: int = 512
    layers: int = 4
    laps: int = 20
    rounds: int = 1
    seconds: float = 0.1
    threads: tuple[int, ...] = tuple(sorted({1, min(2, os.cpu_count() or 1)}))
    races: Races | None = None

    def race(self, contenders: Sequence[Contender]) -> Times:
        """Time them in turn, as often as these settings say; with the rounds of earlier laps."""
        (times,) = self.race_on([torch.get_num_threads()], contenders).values()
        return times

    def race_on(self, counts: Sequence[int], contenders: Sequence[Contender]) -> dict[int, Times]:
        """The same on each number of threads, after one warm-up on the first of them."""
        found: dict[int, Times] = {}
        staying = list(contenders)
        for count in counts:
            with threads(count):
                times = interleave(staying, rounds=self.rounds, seconds=self.seconds, warm=bool(found))
            staying = [c for c in staying if c.name in times]
            found[count] = times if self.races is None else self.races.add(times)
        return found


QUICK = Settings(
    values=4000,
    few=1000,
    sweep=(1000, 2000, 4000),
    fractions=(0.10, 0.50),
    divide=128,
    hidden=32,
    layers=1,
    laps=1,
    seconds=0.0,
)

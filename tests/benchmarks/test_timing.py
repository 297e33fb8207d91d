"""The timing helper against a clock that the contenders move by hand."""

import gc

import pytest
import torch

from benchmarks.settings import Settings
from benchmarks.timing import COPY, Contender, Races, Ratio, digits, interleave, median_ratio, over, ratio


class Clock:
    """Contenders that take a told time, and a log of what ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds: list[float], **options) -> Contender:
        """Runs take these times in turn, the last one from then on; preparing takes an hour."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        def prepare() -> None:
            self.log.append(f"prepare {name}")
            self.now += 3600

        return Contender(name, run, prepare, **options)


def test_contenders_run_in_turn_after_one_warm_up_each() -> None:
    clock = Clock()
    times = interleave([clock.contender("a", [9, 1, 2, 3]), clock.contender("b", [9, 4])], rounds=3, clock=clock)
    assert clock.log == ["prepare a", "a", "prepare b", "b"] * 4
    assert times == {"a": [1, 2, 3], "b": [4, 4, 4]}


def test_what_is_warm_runs_in_rounds_alone() -> None:
    clock = Clock()
    times = interleave([clock.contender("a", [1, 2, 3])], rounds=2, warm=True, clock=clock)
    assert times == {"a": [1, 2]}


def test_each_number_of_threads_has_its_rounds_after_one_warm_up() -> None:
    seen: list[int] = []
    counts = [torch.get_num_threads() + 1, 1]
    rows = [Contender("a", lambda: seen.append(torch.get_num_threads())), Contender("rival", lambda: 1 / 0, limit=9.0)]
    with pytest.warns(UserWarning, match="rival is left out") as told:
        found = Settings(rounds=2, seconds=0.0).race_on(counts, rows)
    assert seen == [*3 * counts[:1], *2 * counts[1:]]
    assert len(told) == 1
    assert {count: {name: len(x) for name, x in times.items()} for count, times in found.items()} == {
        count: {"a": 2} for count in counts
    }


def test_more_rounds_until_the_time_is_up() -> None:
    clock = Clock()
    times = interleave([clock.contender("a", [1.0])], rounds=3, seconds=10, clock=clock)
    assert len(times["a"]) == 10


def test_rounds_end_although_nothing_takes_any_time() -> None:
    clock = Clock()
    times = interleave([clock.contender("a", [0.0])], rounds=3, seconds=10, clock=clock)
    assert len(times["a"]) == 60


def test_a_contender_over_its_limit_is_left_out() -> None:
    clock = Clock()
    slow = clock.contender("slow", [2.0], limit=1.0)
    times = interleave([clock.contender("a", [1.0]), slow], rounds=3, clock=clock)
    assert list(times) == ["a"]
    assert clock.log.count("slow") == 1
    assert ratio(times, "slow", "a") is None


def test_a_rival_that_fails_is_left_out() -> None:
    clock = Clock()
    with pytest.warns(UserWarning, match="rival is left out: division by zero"):
        times = interleave([clock.contender("a", [1.0]), Contender("rival", lambda: 1 / 0, limit=9.0)], clock=clock)
    assert list(times) == ["a"]


def test_a_row_of_our_own_may_not_fail() -> None:
    with pytest.raises(ZeroDivisionError):
        interleave([Contender("ours", lambda: 1 / 0)], clock=Clock())


def test_ratios_are_taken_within_a_round() -> None:
    # The machine slows down threefold in the middle: every round still says that b takes twice as long.
    times = {COPY: [1.0, 3.0, 3.0, 1.0], "b": [2.0, 6.0, 6.0, 2.0]}
    found = ratio(times, "b")
    assert found is not None
    assert (found.low, found.median, found.high) == (2, 2, 2)


def test_ratio_is_a_median_with_quartiles() -> None:
    times = {COPY: [1.0] * 5, "b": [1.0, 2.0, 3.0, 4.0, 100.0]}
    found = ratio(times, "b")
    assert found is not None
    assert (found.low, found.median, found.high) == (2, 3, 4)
    assert median_ratio(times, "b") == 3


def test_a_lone_round_is_median_and_quartiles() -> None:
    assert ratio({COPY: [2.0], "b": [3.0]}, "b") == Ratio(1.5, 1.5, 1.5)


def test_milliseconds_over_another() -> None:
    found = over({"a": [1.0] * 5, "b": [1.001, 1.002, 1.003, 1.004, 9.0]}, "b", "a")
    assert (found.low, found.median, found.high) == pytest.approx((2, 3, 4))


def test_laps_add_up_comparison_by_comparison() -> None:
    races = Races()
    for lap in (1.0, 2.0):
        races.begin()
        first = races.add({"a": [lap], "b": [10 * lap]})
        second = races.add({"a": [100 * lap]} if lap == 1 else {"a": [200.0], "left out before": [1.0]})
    assert first == {"a": [1.0, 2.0], "b": [10.0, 20.0]}
    assert second == {"a": [100.0, 200.0]}
    races.begin()
    with pytest.raises(ValueError, match="do not continue"):
        races.add({"c": [1.0]})


def test_no_garbage_collection_while_timing() -> None:
    assert gc.isenabled()
    seen: list[bool] = []
    interleave([Contender("a", lambda: seen.append(gc.isenabled()))], rounds=2)
    assert seen == [False] * 3
    assert gc.isenabled()


def test_names_must_differ() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="distinct names"):
        interleave([clock.contender("a", [1.0]), clock.contender("a", [1.0])], clock=clock)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0"), (0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (float("inf"), "inf")],
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text

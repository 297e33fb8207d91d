"""Many small tensors against one large one: a list must not cost launches."""

from benchmarks import figures
from benchmarks.report import Goal, Section, Table, on
from benchmarks.settings import Settings
from benchmarks.setups import Captured, Shape, gradients, llava
from benchmarks.setups import count as numbers
from benchmarks.timing import Contender, Ratio, copy_of, ratio
from torch_mdgd import kernels

ONE = "one tensor"


def lists(divide: int) -> dict[str, list[Shape]]:
    """The same total in one tensor, in LLaVA's list, and in a thousand equal tensors."""
    shapes = llava(divide)
    n = numbers(shapes)
    return {ONE: [(n,)], f"LLaVA, {len(shapes)} tensors": shapes, "1000 tensors": [(n // 1000,)] * 1000}


def combine_contenders(divide: int) -> list[Contender]:
    """(6)-(9) for each list, and the copy."""
    found = []
    for name, shapes in lists(divide).items():
        update = Captured(gradients(shapes))
        found.append(Contender(name, update.combine, update.prepare))
    return [copy_of(numbers(llava(divide))), *found]


def mask_contenders(divide: int) -> list[Contender]:
    """The top 10 % for each list, and the copy."""
    found = []
    for name, shapes in lists(divide).items():
        scores = gradients(shapes)["task"]
        found.append(Contender(name, _mask(scores, max(1, numbers(shapes) // 10))))
    return [copy_of(numbers(llava(divide))), *found]


def _mask(scores, k: int):
    return lambda: kernels.top_k_masks(scores, k)


def section(settings: Settings) -> Section:
    """Time both operations over each list on each number of threads."""
    names = list(lists(settings.divide))
    rows, goals = [], []
    series: dict[str, dict[str, Ratio | None]] = {}
    timed = {
        operation: settings.race_on(settings.threads, make(settings.divide))
        for operation, make in (("(6)-(9)", combine_contenders), ("top-k mask", mask_contenders))
    }
    for count in settings.threads:
        for operation, found in timed.items():
            times = found[count]
            what = f"{operation}, {on(count)}"
            series[what] = {name: ratio(times, name) for name in names}
            for name in names:
                relative = ratio(times, name, ONE)
                rows.append((f"{what}, {name}", str(series[what][name]), str(relative)))
                if name.startswith("LLaVA") and relative is not None:
                    goal = f"{what}: LLaVA's list, against one tensor of the same total"
                    goals.append(Goal(goal, 1.3, relative.median))
    table = Table("Time, median and quartiles", ("operation, list", "copies", "against one tensor"), rows)
    about = (
        f"The same {numbers(llava(settings.divide)):,} numbers (rounded down for the thousand equal tensors) cut up in "
        f"three ways, float32. LLaVA's widths are divided by {settings.divide}."
    )
    figure = figures.bars("Lists", "copies", series, log=False)
    return Section("shapes", "Many small tensors", about, [table], goals, figure)

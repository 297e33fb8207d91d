"""Tables and goals, on the terminal and as Markdown."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.peers import versions
from benchmarks.timing import digits

GOALS = ("what", "goal", "reached", "", "why not")


@dataclass
class Table:
    """Rows of text under a title; ``notes`` are printed below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Goal:
    """A limit and what was measured against it.

    Args:
        what: is limited.
        limit: of it.
        reached: the measurement; None if a peer is missing or was left out.
        at_least: whether the limit is one from below.
        unit: of both.
        why: it is not reached, if it is not.
    """

    what: str
    limit: float
    reached: float | None
    at_least: bool = False
    unit: str = "×"
    why: str = ""

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached >= self.limit if self.at_least else self.reached <= self.limit

    def cells(self) -> tuple[str, str, str, str, str]:
        bound = f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}"
        reached = "" if self.reached is None else f"{_number(self.reached)} {self.unit}"
        verdict = {True: "met", False: "not met", None: "not measured"}[self.met]
        return self.what, bound.strip(), reached.strip(), verdict, self.why if self.met is False else ""


@dataclass
class Section:
    """All that one benchmark found.

    Args:
        name: of the files.
        title: the heading.
        about: what was compared, and how.
        tables: in order.
        goals: may be none.
        figure: one picture.
    """

    name: str
    title: str
    about: str
    tables: list[Table]
    goals: list[Goal]
    figure: Figure

    def show(self) -> None:
        """Print on the terminal."""
        from rich.console import Console
        from rich.table import Table as RichTable

        console = Console()
        console.rule(f"[bold]{self.title}")
        console.print(self.about, markup=False)
        for table in self.all_tables():
            shown = RichTable(title=table.title, title_justify="left")
            for i, column in enumerate(table.columns):
                shown.add_column(column, justify="right" if i else "left")
            for row in table.rows:
                shown.add_row(*row)
            console.print(shown)
            for note in table.notes:
                console.print(note, markup=False)

    def write(self, folder: Path) -> None:
        """Write ``NAME.md`` and ``NAME.png``."""
        lines = [f"# {self.title}", "", self.about, "", machine(), ""]
        for table in self.all_tables():
            lines += [f"## {table.title}", "", *_markdown(table), ""]
            lines += [line for note in table.notes for line in (note, "")]
        lines += [f"![{self.title}]({self.name}.png)"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.figure.savefig(folder / f"{self.name}.png", dpi=120, bbox_inches="tight", metadata={"Software": None})

    def all_tables(self) -> list[Table]:
        """The tables, goals last."""
        goals = Table("Goals", GOALS, [goal.cells() for goal in self.goals])
        return [*self.tables, *([goals] if self.goals else [])]


def machine() -> str:
    """What it ran on, and beside which versions."""
    peers = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"torch {torch.__version__} on {_cpu()}; peers: {peers}."


def mega(n: int) -> str:
    """A count in millions, or thousands."""
    return f"{n / 1e6:g} M" if n >= 1e6 else f"{n / 1e3:g} k"


def on(threads: int) -> str:
    """A number of threads in words."""
    return f"{threads} thread{'s'[: threads > 1]}"


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else digits(value)


def _markdown(table: Table) -> list[str]:
    head = [table.columns, [":--", *["--:"] * (len(table.columns) - 1)]]
    return ["| " + " | ".join(row) + " |" for row in [*head, *table.rows]]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} × {len(names)}" if names else platform.processor() or platform.machine()

"""A quick run of everything: tables, figures, goals, the command line and the suites."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import combine, costs, figures, language_model, memory, methods, peers, scaling, training
from benchmarks.commands import SECTIONS, main, run
from benchmarks.costs import ALIGN, BARE, LAZY, LOW, PLAIN, PUBLISHED, TWO_PASSES
from benchmarks.report import Goal, Section
from benchmarks.settings import QUICK, Settings
from benchmarks.timing import Contender

ROOT = Path(__file__).resolve().parents[2]
# Whether a number is right is asked elsewhere: fewer rounds.
SETTINGS = replace(QUICK, threads=(1,), rounds=2)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", params=SECTIONS)
def section(request: pytest.FixtureRequest) -> Iterator[Section]:
    with pytest.MonkeyPatch.context() as patch:
        # One of the two choices of what is trained, and rounds of a step of what goals are of: test_costs.py makes a
        # step of every way, and whole rounds.
        patch.setattr(costs, "parts", lambda model, every=costs.parts: {costs.WHOLE: every(model)[costs.WHOLE]})
        few = (PLAIN, TWO_PASSES, BARE, ALIGN, LAZY, PUBLISHED, LOW)
        patch.setattr(costs, "WAYS", tuple(replace(way, steps=1) for way in few))
        yield SECTIONS[request.param](SETTINGS)


def test_every_table_is_full_of_finite_numbers(section: Section) -> None:
    for table in section.all_tables():
        assert table.rows, table.title
        for row in table.rows:
            assert len(row) == len(table.columns), row
            for cell in row[1:]:
                for number in re.findall(r"nan|inf|-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?", cell):
                    assert math.isfinite(float(number.replace(",", ""))), row


def test_every_goal_has_a_verdict(section: Section) -> None:
    assert section.goals
    for goal in section.goals:
        assert goal.met is not None or goal.reached is None
        if goal.reached is not None:
            assert math.isfinite(goal.reached), goal


def test_written_and_shown(section: Section, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    section.write(tmp_path)
    text = (tmp_path / f"{section.name}.md").read_text(encoding="utf-8")
    assert (tmp_path / f"{section.name}.png").read_bytes().startswith(PNG)
    for table in section.all_tables():
        assert f"## {table.title}" in text
        for row in table.rows:
            assert "| " + " | ".join(row) + " |" in text
    assert "torch " in text
    section.show()
    assert section.title in capsys.readouterr().out


@pytest.mark.parametrize(
    ("limit", "reached", "at_least", "met"),
    [(3, 2.9, False, True), (3, 3.0, False, True), (3, 3.1, False, False), (3, 2.9, True, False), (3, 3.1, True, True)],
)
def test_goals(limit: float, reached: float, at_least: bool, met: bool) -> None:
    goal = Goal("it", limit, reached, at_least)
    assert goal.met is met
    assert goal.cells()[3] == ("met" if met else "not met")


def test_why_is_said_where_a_goal_is_not_reached() -> None:
    assert [Goal("it", 3, reached, why="slow").cells()[-1] for reached in (2, 4, None)] == ["", "slow", ""]


def test_a_goal_that_was_not_measured_is_neither() -> None:
    assert Goal("it", 3, None).cells() == ("it", "≤ 3 ×", "", "not measured", "")


def test_the_exponent_of_a_power_law() -> None:
    assert scaling.slope([(n, 5 * n**1.5) for n in (10, 100, 1000)]) == pytest.approx(1.5)


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in peers.DISTRIBUTIONS else find(name, *more)
    )
    assert set(peers.versions().values()) == {"not installed"}
    found = combine.section(SETTINGS)
    cells = {row[0]: row[1] for table in found.tables for row in table.rows}
    assert {cells[name] for name in combine.PEER_ROWS} == {"not installed"}
    assert "not installed" not in {cells[combine.OURS], cells[combine.NAIVE]}
    assert [goal.met for goal in found.goals][-1] is None
    few = (methods.PLAIN, *(m for m in methods.METHODS if m.adapter), methods.MDGD, *methods.COMPACT)
    for module in (training, memory):
        monkeypatch.setattr(module, "METHODS", few)
    monkeypatch.setattr(training, "CHEAPER", ())
    rows = {row[0]: row[1] for section in (training, memory) for row in section.section(SETTINGS).tables[0].rows}
    assert rows["SHiRA"] == rows["LoRA"] == "not installed"


def test_the_same_numbers_are_trained_by_both_adapters() -> None:
    pytest.importorskip("peft")
    trained = {m.name: language_model.build(m, SETTINGS).trained for m in methods.METHODS}
    assert trained["LoRA"] == trained["SHiRA"]
    assert trained["LoRA"] == pytest.approx(trained["Fine-tune"] / 10, rel=0.2)


def test_command_line_runs_one_section(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["parts", "--quick", "--threads", "1", "--out", str(tmp_path)])
    assert "lap 1 of 1: parts" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.md", "parts.png"]


def test_laps_add_up_and_what_is_counted_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def timed(settings: Settings) -> Section:
        times = settings.race([Contender("a", lambda: None)])
        seen.append(("parts", len(times["a"])))
        return Section("parts", "", "", [], [], figures.stacks("", "", {"row": {"part": 1.0}}))

    def counted(settings: Settings) -> Section:
        return replace(timed(settings), name="memory")

    monkeypatch.setitem(SECTIONS, "parts", timed)
    monkeypatch.setitem(SECTIONS, "memory", counted)
    took = run(["parts", "memory"], replace(QUICK, laps=3, rounds=2, seconds=0.0), tmp_path)
    assert [rounds for _, rounds in seen] == [2, 4, 6, 2]
    assert list(took) == ["parts", "memory"]
    assert sorted(path.stem for path in tmp_path.glob("*.md")) == ["memory", "parts"]


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "combine" in capsys.readouterr().err


def test_suites_save_and_compare(tmp_path: Path) -> None:
    small = ["--values", "1024", "--divide", "128", "--hidden", "32", f"--benchmark-storage=file://{tmp_path}"]
    # In one process, since most of its time is that of imports.
    twice = "for how in ('save=first', 'compare=0001'): assert not pytest.main([*sys.argv[1:], f'--benchmark-{how}'])"
    # Not the cache of the repository, nor its plugins that share out tests: a suite is timed alone.
    suite = ["benchmarks/test_combine.py", "-q", "-p", "no:cacheprovider", *small]
    command = [sys.executable, "-c", f"import sys, pytest\n{twice}", *suite]
    # A worker's own, which would switch benchmarks off.
    environment = {key: x for key, x in os.environ.items() if not key.startswith("PYTEST_")} | {"COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(0001_first)" in done.stdout, "in the table of the second"
    (saved,) = tmp_path.rglob("*_first.json")
    groups = {found["group"] for found in json.loads(saved.read_text())["benchmarks"]}
    assert groups == {"update, float32", "update, bfloat16"}

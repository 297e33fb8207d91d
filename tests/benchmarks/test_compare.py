"""Two runs held to each other by their pages, and the goals of all pages in one table."""

from pathlib import Path

import pytest

from benchmarks.compare import main
from benchmarks.goals import BEGIN, END, HERE, goals, put

PAGE = """# The step

| page | seconds |
| :-- | --: |
| step | 3 |

## Time

| step | copies | steps |
| :-- | --: | --: |
| plain | 2.0 (1.5–2.5) | {plain} |
| wide | 1,200 (1,100–1,300) | left out |

## Goals

| what | goal | reached |  |
| :-- | --: | --: | --: |
| plain | ≤ 3 × | 2.00 × | met |
"""


def _page(folder: Path, plain: str) -> str:
    folder.mkdir()
    (folder / "step.md").write_text(PAGE.format(plain=plain), encoding="utf-8")
    return str(folder)


def test_a_run_agrees_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = _page(tmp_path / "a", "4.0 (3.0–5.0)")
    assert main([first, first]) == 0
    assert "Of 3 cells 3 agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ("5.0 (4.9–5.1)", "agree"),
        ("6.0 (3.9–7.0)", "agree"),
        ("5.1 (4.9–5.3)", "near"),
        ("6.0 (5.0–7.0)", "near"),
        ("2.0 (1.0–3.0)", "near"),
        ("6.0 (5.1–7.0)", "disagree"),
        ("2.0 (1.0–2.9)", "disagree"),
    ],
)
def test_verdicts(second: str, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = _page(tmp_path / "a", "4.0 (3.0–5.0)"), _page(tmp_path / "b", second)
    for one, other in (folders, folders[::-1]):
        assert main([one, other, "--save"]) == int(verdict == "disagree")
        shown = capsys.readouterr().out
        (line,) = (line for line in shown.splitlines() if line.startswith("| Time · plain · steps |"))
        assert line.strip("|* ").endswith(f" {verdict}") or line.endswith(f"**{verdict}** |")
        assert f"Of 3 cells {3 if verdict == 'agree' else 2} agree" in shown
        assert (Path(one) / "second.md").read_text(encoding="utf-8") == shown


def test_folders_without_a_page_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = _page(tmp_path / "a", "left out")
    with pytest.raises(SystemExit):
        main([first, str(tmp_path)])
    assert f"{tmp_path} has no page" in capsys.readouterr().err


def test_goals_of_all_pages(tmp_path: Path) -> None:
    folder = Path(_page(tmp_path / "results", "4.0 (3.0–5.0)"))
    assert "| [step](results/step.md) | plain | ≤ 3 × | 2.00 × | met |  |" in goals(folder)
    with pytest.raises(ValueError, match="no page"):
        goals(tmp_path)


def test_the_readme_has_the_goals_of_the_results() -> None:
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert readme.count(BEGIN) == readme.count(END) == 1
    assert put(goals(HERE / "results"), readme) == readme, "run python -m benchmarks goals"

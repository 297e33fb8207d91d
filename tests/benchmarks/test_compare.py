"""Two runs held to each other by their pages."""

from pathlib import Path

import pytest

from benchmarks.compare import main

PAGE = """# The step

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
    assert capsys.readouterr().out.startswith("3 of 3 medians")


@pytest.mark.parametrize(("median", "agrees"), [("3.0", True), ("5.0", True), ("2.9", False), ("5.1", False)])
def test_a_median_agrees_within_the_first_quartiles(
    median: str, agrees: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # The second run's own quartiles are wide and do not count.
    first, second = _page(tmp_path / "a", "4.0 (3.0–5.0)"), _page(tmp_path / "b", f"{median} (0.1–99)")
    assert main([first, second]) == int(not agrees)
    shown = capsys.readouterr().out
    assert ("step · Time · plain · steps: 4.00 (3.00–5.00)" in shown) is not agrees
    assert f"{3 if agrees else 2} of 3 medians" in shown


def test_folders_without_a_page_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = _page(tmp_path / "a", "left out")
    with pytest.raises(SystemExit):
        main([first, str(tmp_path)])
    assert f"{tmp_path} has no page" in capsys.readouterr().err

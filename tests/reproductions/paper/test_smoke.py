"""The command line: every row of both tables on tiny models and small files, and what is made of the results."""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from reproductions.__main__ import app
from reproductions.methods import METHODS
from reproductions.paper.config import experiment_names, load_experiment
from reproductions.paper.models import MODELS
from reproductions.paper.report import page
from reproductions.paper.report.published import published
from reproductions.paper.run import oracle, rows
from reproductions.paper.run.weights import NAME


def call(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


OF_TABLES = {name: MODELS[name] for name in ("llava-1.5-7b", "minicpm-v-2")}
ROWS_OF_TODAY = {
    "zero-shot",
    "fine-tune",
    "lora",
    "mdgd",
    "mdgd-no-align",
    "mdgd-gm",
    "fine-tune-lv",
    "anchor",
    "lora-all",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All rows of the tables' models by one command; models of today run in `test_models` and `test_presets`."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "MODELS", OF_TABLES)
        done = call("run", "--smoke", "--all", "--results", folder)
    assert done.exit_code == 0, done.output
    assert gc.get_freeze_count(), "and the rest of the tests need not collect among all that was imported"
    return folder


def test_by_itself_the_command_takes_every_model_of_today():
    found = rows.chosen(None, None, True, False, True, [])
    models = {load_experiment(name).model for name in found}
    assert models == set(MODELS)
    for name, methods in found.items():
        if "@" in name:
            assert set(methods) == ROWS_OF_TODAY


def test_every_row_of_both_tables_ran_and_every_other_method_once(finished):
    ran = {(path.parent.parent.name, path.parent.name) for path in finished.glob("*/*/status.json")}
    for name, table in published().items():
        assert {(name, method) for method in table.rows} <= ran
    assert {method for _, method in ran} == {*METHODS, "oracle"}
    assert {name for name, _ in ran} == set(experiment_names())
    for path in finished.glob("*/*/status.json"):
        status = json.loads(path.read_text())
        assert status["stage"] == "done"
        if path.parent.name == "oracle":
            continue
        assert status["wall_seconds"] > 0
        tasks = {file.stem for file in (path.parent / "evaluation").glob("*.json")}
        assert tasks == set(published()[path.parent.parent.name].tasks)
        assert (path.parent / "training.jsonl").exists() == (
            path.parent.name not in ("zero-shot", "model-tailor", "wise-ft")
        )
        assert (path.parent / "analysis" / "masking.json").exists() == (path.parent.name == "mdgd-gm")
        if path.parent.name != "zero-shot":
            trained = load_file(path.parent / NAME).values()
            assert {x.dtype for x in trained} == {torch.bfloat16}, "as the weights are that it began with"


def test_a_second_call_has_nothing_to_do(finished, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    monkeypatch.setattr(rows, "MODELS", OF_TABLES)
    monkeypatch.setattr(oracle, "run_oracle", lambda *arguments: None)
    again = call("run", "--smoke", "--all", "--results", finished)
    assert again.exit_code == 0
    assert again.output.count("done already") == len(list(finished.glob("*/*/trained.json"))) + 4, "and zero-shot"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_tables_figures_and_report_come_from_it(finished, tmp_path, monkeypatch):
    printed = call("table", "--results", finished)
    assert printed.exit_code == 0
    assert printed.output.count("published") >= 26
    assert printed.output.count("smoke") >= 26
    drawn = call("figures", "--results", finished, "--output", tmp_path / "figures")
    assert drawn.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [f"figure{i}.png" for i in range(1, 6)]
    # The report shows the same figures, which take a second each.
    monkeypatch.setattr(page, "draw_all", lambda results, output: sorted((tmp_path / "figures").iterdir()))
    written = call("report", "--results", finished, "--output", tmp_path / "page.html")
    assert written.exit_code == 0
    text = (tmp_path / "page.html").read_text()
    assert "Smoke" in text
    assert text.count("data:image/png;base64") >= 5


def test_list_shows_counts_needs_and_what_has_run(finished):
    shown = call("list", "--results", finished)
    assert shown.exit_code == 0
    for count in ("1,235,279,872", "517,777,920", "29,368,320", "35,265,024", "123,527,987", "51,777,792"):
        assert count in shown.output
    assert shown.output.count("done, 0.0 h") == 26
    fits = [line.split("│") for line in shown.output.splitlines() if line.startswith("│")]
    cells = {row[1].strip(): [cell.strip() for cell in row[7:10]] for row in fits}
    assert cells["zero-shot"] == ["yes", "yes", "yes"]
    assert cells["mdgd"][0] != "yes" == cells["mdgd"][2], "of MiniCPM-V-2.0, the last table"
    assert "with 8, --set training.optimizer=adamw8bit" in shown.output
    for name in ("hour", "day"):
        assert f"run --preset {name}\n" in shown.output
    assert "Figure 3: learning curves; agreement and drift against the masking ratio. 12 of 12 rows" in shown.output
    assert "Figure 5: t-SNE of features of LLaVA. 6 of 6 rows: zero-shot, fine-tune, mdgd of both llava" in shown.output
    readme = (Path(__file__).parents[3] / "reproductions" / "README.md").read_text()
    totals = shown.output[shown.output.index("All rows: ") :]
    for number in re.findall(r"\d+ (?:GPU hours|on two|GB to fetch|GB for the copy|GB of results)", totals):
        assert number in " ".join(readme.split()), "as README tells it"
    for word in ("GPU hours", "Flickr30k", "PathVQA", "GB to fetch", "corda"):
        assert word in shown.output


def test_one_row_and_settings_of_ones_own(assets, tmp_path):
    (tmp_path / "assets").symlink_to(assets.folder)
    asked = (
        "run", "llava-okvqa", "--method", "mdgd", "--smoke", "--results", tmp_path, "--set", "training.steps=1",
        "--set", 'pretrained=["pope"]',
    )  # fmt: skip
    done = call(*asked, "--set", "methods.mdgd.align=7")
    assert done.exit_code == 0, done.output
    other = call(*asked, "--set", "methods.mdgd.align=8")
    assert other.exit_code == 2
    assert "another configuration (methods.mdgd.align)" in " ".join(other.output.split())
    assert "examples" not in other.output, "before data are looked at"
    config = json.loads((tmp_path / "llava-okvqa" / "mdgd" / "config.json").read_text())["configuration"]
    assert (config["training"]["steps"], config["methods"]["mdgd"]["align"]) == (1, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "name an experiment (llava-flickr30k, "),
        (["run", "llava-okvqa"], "pass --method (zero-shot, "),
        (["run", "llava-okvqa", "--method", "mgdg"], "no method 'mgdg'"),
        (["run", "llava", "--all"], "no experiment 'llava'"),
        (["run", "llava-okvqa", "--all", "--set", "training.step=1"], "llava-okvqa.toml: unknown key training.step"),
        (["list", "--set", "layers=99"], "llava-flickr30k: layers must be at most the 32 of llava-1.5-7b, got 99"),
        (["run", "llava-okvqa", "--all", "--seeds", "0,1", "--set", "seed=3"], "--seeds and --set seed both name"),
        (["list", "--set", "training.step=1"], "llava-flickr30k.toml: unknown key training.step; there are epochs, "),
        (["run", "llava-okvqa", "--all", "--data", "nowhere"], "data.source: there is no folder nowhere"),
        (["table", "--results", "nowhere"], "there is no folder nowhere"),
        (["report", "--results", "nowhere"], "there is no folder nowhere"),
        (["harness", "nowhere", "--tasks", "gqa"], "nowhere holds no run"),
    ],
)
def test_a_request_that_makes_no_sense_is_answered_in_a_line(arguments, message):
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_package_that_is_not_installed_is_named():
    code = (
        "import sys; sys.modules['datasets'] = None; from typer.testing import CliRunner; "
        "from reproductions.__main__ import app\n"
        "for command in (['list'], ['run', '--all'], ['report'], ['table']):\n"
        "    done = CliRunner().invoke(app, command); assert done.exit_code == 2, done.output; print(done.output)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("datasets is not installed: pip install -e '.[paper]'") == 4, done.stderr


def test_help_needs_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from reproductions.__main__ import app; "
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0; "
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

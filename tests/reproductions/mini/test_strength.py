"""The command that measures which strength of the anchor carries over."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from reproductions.mini.commands import app
from reproductions.mini.experiment import strength
from reproductions.mini.experiment.calibration import prompts
from reproductions.mini.experiment.finetune import finetune, prepare
from reproductions.mini.experiment.study import Size
from reproductions.mini.experiment.tune import SEEDS
from reproductions.mini.model.checkpoint import load_checkpoint
from reproductions.shared.results import read_results
from torch_mdgd import MDGDOptimizer

RESULTS = Path(strength.__file__).parents[1] / "results"
SMALL = ["--steps", "2", "--batch", "2", "--examples", "2", "--workers", "1"]
SIZE = Size(2, 2, 2)


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr(f"{finetune.__module__}.prompts", partial(prompts, batches=1, size=4))


def call(folder, *arguments):
    threads = torch.get_num_threads()
    called = CliRunner().invoke(
        app, ["strength", "--output", str(folder), *SMALL, *arguments], env={"COLUMNS": "200"}, catch_exceptions=False
    )
    torch.set_num_threads(threads)
    assert called.exit_code == 0
    return called.output


def test_it_runs_what_is_chosen_and_says_what_was_not(tmp_path):
    chosen = ["--cells", "caption-lora,caption-sgd", "--factors", "2", "--seeds", "100"]
    printed = call(tmp_path, *chosen, "--strengths", "5,project-0.9")
    told = (tmp_path / "strength.md").read_text()
    assert "5, the default" in printed
    for part in (
        "| captions, LoRA | 0.016 | 5, the default |",
        "| captions, SGD | 0.4 | project-0.9 |",
        "Not run yet at the cells' rates, all cells: everything.",
        "Not run yet at 2 times these, captions, LoRA; captions, SGD: 0.3, 1, 3, 10, 30, absolute-0.003,",
        "The default strength, 5, is behind the best",
    ):
        assert part in told
    lines = (tmp_path / "strength.jsonl").read_text().splitlines()
    assert len(lines) == 4
    call(tmp_path, *chosen, "--strengths", "5")
    assert (tmp_path / "strength.jsonl").read_text().splitlines() == lines, "nothing is run twice"


def test_every_form_trains_in_every_cell():
    assert f"{strength.DEFAULT:g}" in strength.FORMS
    for place, where in strength.PLACES.items():
        for form in ("5", "absolute-0.01", "l2-0.01", "project-0.9"):
            run = strength.run_of(place, form, 1.0, 100, SIZE)
            assert (run.split, run.target, run.method.base) == ("validation", where.target, where.base)
            model, parameters = prepare(load_checkpoint()[0], run.method)
            optimizer = run.method.with_settings(calibration="running").optimizer(model, parameters)
            assert isinstance(optimizer, MDGDOptimizer) == (not form.startswith("l2"))
            assert optimizer.param_groups[0]["lr"] == where.rate
            if form.startswith("absolute"):
                assert not optimizer.rule.relative


def made_up(scores, seeds=SEEDS):
    """Results with these H by place and form, at the cells' rates."""
    found = {}
    for (place, form), H in scores.items():
        for seed in seeds:
            run = strength.run_of(place, form, 1.0, seed, SIZE)
            both = {"T": H, "T_words": H, "P": H, "P_restricted": H}
            found[run.key] = {"key": run.key, "target": run.target, **both}
    return found


def test_the_best_is_marked_and_the_defaults_loss_is_told():
    scores = {
        ("digits-lora", "3"): 92.0, ("digits-lora", "5"): 91.0, ("digits-lora", "l2-0.1"): 80.0,
        ("digits-adamw", "5"): 95.0, ("digits-adamw", "10"): 93.0, ("caption-sgd", "5"): 70.0,
    }  # fmt: skip
    table = strength.table_of(made_up(scores), SIZE)
    behind = {(row[0], row[2]): row[7] for row in table.rows}
    assert behind == {
        ("digits, LoRA", "3"): "best", ("digits, LoRA", "5, the default"): "−1.0", ("digits, LoRA", "l2-0.1"): "−12.0",
        ("digits, AdamW", "5, the default"): "best", ("digits, AdamW", "10"): "−2.0",
        ("captions, SGD", "5, the default"): "best",
    }  # fmt: skip
    assert {row[8] for row in table.rows} == {"2"}
    told = " ".join(table.notes)
    assert "by 0.5 of H in the mean of 2, and by 1.0 at most (digits, LoRA at 0.004)" in told, "one alone tells nothing"


def test_forms_are_compared_on_the_seeds_of_both():
    found = made_up({("digits-lora", "3"): 92.0, ("digits-lora", "5"): 91.0}, seeds=(100,))
    found |= made_up({("digits-lora", "5"): 97.0}, seeds=(101,))
    rows = {row[2]: row for row in strength.table_of(found, SIZE).rows}
    assert rows["3"][6:] == ("92.0", "best", "1")
    assert rows["5, the default"][6:] == ("94.0", "−1.0", "2"), "the other seed is an easier one"


def test_only_seeds_that_settings_are_chosen_with():
    with pytest.raises(ValueError, match="seed 3 is kept for tests"):
        strength.require_tuning_seeds([100, 3])


def test_the_committed_table_is_that_of_the_committed_results():
    found = read_results(RESULTS / "strength.jsonl")
    assert {json.loads(key)["seed"] for key in found} <= set(SEEDS)
    table = strength.table_of(found, Size())
    assert (RESULTS / "strength.md").read_text(encoding="utf-8") == table.markdown
    wanted = strength.runs(list(strength.PLACES), list(strength.FORMS), strength.FACTORS, SEEDS, Size())
    assert found.keys() <= {run.key for run in wanted}

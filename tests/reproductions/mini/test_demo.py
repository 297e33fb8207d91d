"""The demo and the choice of its settings, end to end on few steps."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from reproductions.mini import demo
from reproductions.mini.demo import draw_demo, telling_examples
from reproductions.mini.experiment import tune
from reproductions.mini.experiment.finetune import finetune, trainable_parameters
from reproductions.mini.experiment.methods import METHODS
from reproductions.mini.experiment.parallel import execute_all
from reproductions.mini.experiment.run import Run, execute
from reproductions.mini.model.checkpoint import load_checkpoint
from reproductions.mini.world.data import target_data
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.shared.results import read_results
from torch_mdgd import MDGDOptimizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo of 10 steps: its folder, its results and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    console = Console(record=True, width=140)
    found = demo.demo(folder, "digits", [0], steps=10, examples=12, console=console)
    return folder, [results[0] for results in found.values()], console.export_text()


def test_every_method_has_every_number(finished):
    _, results, _ = finished
    assert [r["method"] for r in results] == list(demo.DEFAULT)
    for result in results:
        assert set(result["exact"]) == {*PRETRAINED_TASKS, "digits"}
        assert all(0 <= score <= 100 for score in result["exact"].values())
        assert all(1 <= rank <= 128 for rank in result["effective_rank"].values())
        assert len(result["losses"]) == (0 if result["method"] == "zero-shot" else 10)
    assert results[0]["P"] > 90, "the checkpoint can see"
    assert results[0]["T"] < 20, "the target is new to it"
    assert all(r["losses"][-1] < r["losses"][0] for r in results[1:])


def test_trained_numbers_are_those_that_move():
    for name in ("fine-tune", "mdgd-gm"):
        model, tokenizer = load_checkpoint()
        before = [p.detach().clone() for p in model.parameters()]
        run = Run(METHODS[name], "digits", "validation", seed=100, steps=2, examples=2)
        finetune(model, tokenizer, target_data("digits", "train"), run.method, seed=100, steps=2)
        moved = sum(int((a != b).sum()) for a, b in zip(before, model.parameters(), strict=True))
        trained = execute(run)["trained"]
        assert 0.9 * trained <= moved <= trained


def test_the_last_layers_and_the_projector_are_trained_alone():
    model, _ = load_checkpoint()
    parameters = trainable_parameters(model)
    assert sum(p.numel() for p in parameters) == 459_520
    frozen = {name.split(".layers.")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert not any("projector" in name for name in frozen)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}


def test_table_and_files_hold_the_results(finished):
    folder, results, printed = finished
    for result in results:
        assert result["label"].split(",")[0].split()[0] in printed
    for word in (*PRETRAINED_TASKS, "Avg", "H(P, T)", "effective rank", "numbers trained", "processor seconds"):
        assert word in printed
    saved = json.loads((folder / "demo.json").read_text())
    assert [seeds[0]["key"] for seeds in saved.values()] == [r["key"] for r in results]
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    table, told = (folder / "demo.md").read_text().split("\n\n")
    lines = table.splitlines()
    assert told.startswith("The anchor against αv, on the same seed")
    assert told.split(":")[0] in printed
    assert len({line.count("|") for line in lines}) == 1
    assert all(f"{r['H']:.1f}" in next(line for line in lines if "H(P, T)" in line) for r in results)


def test_the_picture_shows_sight_beside_form(finished, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(demo.plt, "close", drawn.append)
    draw_demo({r["method"]: [r] for r in finished[1]}, "digits", tmp_path / "demo.png")
    monkeypatch.undo()
    bars = drawn[0].axes[-2].containers
    demo.plt.close(drawn[0])
    assert len(bars) == 2 * len(finished[1])
    for result, among, generated in zip(finished[1], bars[::2], bars[1::2], strict=True):
        for name, mean, drawn_bars in (("restricted", "P_restricted", among), ("exact", "P", generated)):
            *old, average, target = (bar.get_height() for bar in drawn_bars)
            assert old == [result[name][task] for task in PRETRAINED_TASKS]
            assert (average, target) == (result[mean], result[name]["digits"])


def test_a_second_call_runs_nothing_again(finished):
    folder, results, _ = finished
    lines = (folder / "results.jsonl").read_text()
    again = demo.demo(folder, "digits", [0], steps=10, examples=12, console=Console(quiet=True))
    assert (folder / "results.jsonl").read_text() == lines
    assert [seeds[0]["key"] for seeds in again.values()] == [r["key"] for r in results]


def test_committed_results_are_found_again():
    folder = Path(demo.__file__).parent / "results"
    found = read_results(folder / "demo" / "results.jsonl").keys()
    assert {run.key for run in demo.runs("digits", [0, 1, 2], 300, 200, list(METHODS))} == found
    assert {run.key for run in demo.runs("digits", [0, 1, 2], 300, 200)} < found
    candidates = [method for name in tune.GRIDS for method in tune.candidates(name)]
    wanted = {Run(m, "digits", "validation", seed, 300, 150).key for m in candidates for seed in tune.SEEDS}
    assert wanted == read_results(folder / "tune.jsonl").keys()


def test_other_methods_are_shown_when_they_are_named(finished, tmp_path):
    (tmp_path / "results.jsonl").write_text((finished[0] / "results.jsonl").read_text())
    console = Console(record=True, width=140)
    options = {"steps": 10, "examples": 12, "console": console}
    found = demo.demo(tmp_path, "digits", [0], **options, names=["step"])
    assert list(found) == [*demo.ALWAYS, "step"]
    assert "decoupled step" in console.export_text()
    assert "The anchor" not in (tmp_path / "demo.md").read_text()


def test_it_says_what_the_anchor_has_more():
    scores = dict.fromkeys(("T", "P", "P_restricted", "H"), 90.0)
    told = demo.comparison({"align": [scores], "anchor": [scores | {"T": 88.0, "H": 89.0}]})
    assert told.startswith("The anchor against αv, on the same seed: H -1.0, T -2.0, P +0.0")
    several = demo.comparison({"align": [scores] * 2, "anchor": [scores, scores | {"H": 92.0}]})
    assert "H +1.0 ± 1.4" in several, "a standard deviation, and no interval"
    assert "standard deviation" in several
    assert demo.comparison({"align": [scores]}) == ""


def test_times_stand_in_the_table_where_all_results_have_them(finished):
    found = {r["method"]: [r] for r in finished[1]}
    assert "processor seconds of training" in list(demo.table(found, "digits").columns[0].cells)
    old = {name: value for name, value in found["mdgd"][0].items() if name != "processor_seconds"}
    assert "processor seconds of training" not in list(demo.table(found | {"mdgd": [old]}, "digits").columns[0].cells)


def test_a_result_cut_short_by_a_kill_is_run_again(finished, tmp_path):
    folder, results, _ = finished
    whole = (folder / "results.jsonl").read_text().splitlines()
    zero = next(line for line in whole if json.loads(line)["method"] == "zero-shot")
    path = tmp_path / "results.jsonl"
    path.write_text(zero[:100] + "\n")
    assert read_results(path) == {}
    run = Run(METHODS["zero-shot"], "digits", "test", 0, 0, 12)
    (result,) = execute_all([run], path, Console(quiet=True))
    assert result["exact"] == results[0]["exact"]
    assert set(read_results(path)) == {run.key}


def test_runs_are_reproducible(finished):
    _, results, _ = finished
    threads = torch.get_num_threads()
    again = execute(Run(METHODS["fine-tune"], "digits", "test", 0, 10, 12))
    torch.set_num_threads(threads)
    wanted = next(r for r in results if r["method"] == "fine-tune")
    assert again["losses"] == wanted["losses"]
    assert list(again["answers"]["digits"]) == list(wanted["answers"]["digits"])


def test_pictures_shown_are_right_before_and_wrong_after_where_there_are_any(finished):
    _, results, _ = finished
    shown = telling_examples(results, 4)
    assert len(shown) == 4
    wrong = sum(r["exact"][t] < results[0]["exact"][t] for t in PRETRAINED_TASKS for r in results[1:2])
    telling = [(e, a) for e, a in shown if a[0] == e.answer != a[1]]
    assert bool(telling) == bool(wrong)


def test_several_seeds_give_mean_and_deviation(finished, tmp_path):
    _, results, _ = finished
    other = {**results[1], "P": results[1]["P"] - 2.0}
    assert demo.spread([results[1]], "P") == f"{results[1]['P']:.1f}"
    assert demo.spread([results[1], other], "P") == f"{results[1]['P'] - 1:.1f} ± 1.4"
    found = {r["method"]: [r] for r in results} | {"fine-tune": [results[1], other]}
    console = Console(record=True, width=200)
    console.print(demo.table(found, "digits"))
    assert "± 1.4" in console.export_text()
    draw_demo(found, "digits", tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_seeds_and_splits_of_tuning_are_not_those_of_the_table():
    assert not set(tune.SEEDS) & set(demo.TEST_SEEDS)
    with pytest.raises(ValueError, match="kept for choosing settings"):
        demo.demo(None, "digits", [0, tune.SEEDS[0]], 1, 1, Console())  # type: ignore[arg-type]
    assert all(run.split == "test" for run in demo.runs("digits", [0], 1, 1))


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="'digit'"):
        Run(METHODS["fine-tune"], "digit", "test", 0)


def test_every_candidate_differs_and_every_method_has_as_many():
    counts = {name: len({str(m) for m in tune.candidates(name)}) for name in tune.GRIDS}
    assert len(set(counts.values())) == 1
    for name in tune.GRIDS:
        for method in tune.candidates(name):
            model, _ = load_checkpoint()
            optimizer = method.with_settings(calibration="running").optimizer(model, trainable_parameters(model))
            assert optimizer.param_groups[0]["lr"] == method.learning_rate
            assert isinstance(optimizer, MDGDOptimizer) == method.has_rule


def test_tune_ranks_candidates_by_the_harmonic_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "SEEDS", (100,))
    # In this process: those of the demo have processes of their own.
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setitem(tune.GRIDS, "fine-tune", {"learning_rate": (1e-9, 2e-3)})
    console = Console(record=True, width=160)
    ranked = tune.tune(tmp_path, ["fine-tune"], "digits", steps=6, examples=8, console=console)
    scores = [results[0]["H"] for results in ranked["fine-tune"]]
    assert scores == sorted(scores, reverse=True)
    assert {r["split"] for results in ranked["fine-tune"] for r in results} == {"validation"}
    assert "learning_rate 0.002" in console.export_text()

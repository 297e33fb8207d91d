"""The claim in the small: presets, several seeds, tuning on validation examples, the oracle and the export."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from reproductions.__main__ import app
from reproductions.methods import METHODS
from reproductions.paper.config import (
    PRESET_NAMES,
    experiment_names,
    load_experiment,
    load_preset,
    method_and_seed,
    run_name,
)
from reproductions.paper.data import DATASETS
from reproductions.paper.models import load_model
from reproductions.paper.report.published import published
from reproductions.paper.report.results import read_seeds
from reproductions.paper.report.seeds import seed_table
from reproductions.paper.run import oracle, preset, tune
from reproductions.paper.run.estimate import CARDS, downloads, estimate
from reproductions.paper.run.export import export_run
from reproductions.paper.run.row import run_row
from reproductions.paper.run.work import Workshop
from reproductions.shared.fields import ConfigError
from tests.reproductions.paper.made_up_results import write_run
from tests.reproductions.paper.running import CPU, EXACT, SHORT

QUIET = Console(quiet=True)
FLICKR = "llava-flickr30k"


def call(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


@pytest.fixture
def begin(assets, monkeypatch):
    """Runs a preset in smoke form, by one command, with some of its seeds and on few examples."""

    def run(name, seeds, folder, *settings):
        path, named = load_preset(name)
        monkeypatch.setattr(preset, "load_preset", lambda name: (path, replace(named, seeds=seeds)))
        (folder / "assets").symlink_to(assets.folder)
        few = ("training.steps=1", "evaluation.examples=1", *settings)
        done = call("run", "--preset", name, "--smoke", "--results", folder, *(x for y in few for x in ("--set", y)))
        assert done.exit_code == 0, done.output
        return done.output

    return run


def test_a_preset_tells_what_it_takes_and_runs_its_rows_with_every_seed(begin, tmp_path):
    output = begin("hour", (0, 1), tmp_path, 'pretrained=["pope"]')
    assert output.index("hours on one RTX 3090 (24 GB)") < output.index("zero-shot: Zero-shot, on cpu")
    ran = {path.parent.name for path in (tmp_path / "hour").glob("*/status.json")}
    trained = {"fine-tune", "fine-tune-low", "fine-tune-lv", "anchor", "mdgd"}
    assert ran == {"zero-shot"} | {run_name(method, seed) for method in trained for seed in range(2)} | {"oracle"}
    assert "± half a 95 % interval over seeds; differences are paired" in " ".join(output.split())
    weights = [load_file(tmp_path / "hour" / run_name("mdgd", seed) / "trained.safetensors") for seed in range(2)]
    name = next(iter(weights[0]))
    assert not torch.equal(weights[0][name], weights[1][name])


def test_the_day_runs_every_row_of_its_own(begin, tmp_path):
    """With one seed, since several are the hour's."""
    begin("day", (0,), tmp_path, 'pretrained=["textvqa"]', "masking.steps=1", "masking.ratios=[0.1]")
    ended = [p for p in (tmp_path / "day").glob("*/status.json") if json.loads(p.read_text())["stage"] == "done"]
    assert {p.parent.name for p in ended} == {*load_preset("day")[1].rows, "oracle"}


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_presets_fit_their_cards_and_hold_the_controls(name):
    path, preset = load_preset(name)
    experiment = load_experiment(str(path))
    assert {"zero-shot", "fine-tune", "fine-tune-low", "fine-tune-lv", "anchor", "mdgd"} <= set(preset.rows)
    assert len(preset.seeds) == 3
    for method in preset.rows:
        assert estimate(experiment, method, preset.card).memory < CARDS[preset.card].memory - 1.5e9
    runs = {method: 3 if METHODS[method].trains else 1 for method in preset.rows}
    hours = sum(times * estimate(experiment, method, preset.card).hours for method, times in runs.items())
    assert hours < {"hour": 1.1, "day": 24}[name]
    # What is measured, and with replay what is remembered.
    assert downloads(experiment, preset.rows)["textvqa"] == {"hour": 0.9, "day": 0.9 + 6.2}[name]


def test_a_preset_has_seeds_of_its_own_and_a_name(tmp_path):
    done = call("run", "--preset", "hour", "--smoke", "--results", tmp_path, "--set", "seed=4")
    assert (done.exit_code, "has seeds of its own (0, 1, 2)" in done.output) == (2, True)
    done = call("run", "llava-okvqa", "--preset", "hour")
    assert (done.exit_code, "--preset names model, rows and seeds itself" in done.output) == (2, True)
    done = call("run", "--preset", "week")
    assert (done.exit_code, "no preset 'week'; there are hour, day" in done.output) == (2, True)


def test_a_folder_is_named_after_method_and_seed():
    for method in METHODS:
        for seed in (0, 7, 12):
            assert method_and_seed(run_name(method, seed)) == (method, seed)


def made_up(folder, method, scores):
    """Runs of one method whose target scores are these, by seed."""
    experiment = published()[FLICKR]
    for seed, score in enumerate(scores):
        run = write_run(folder, experiment, experiment.rows[method])
        path = run.folder / "evaluation" / "flickr30k.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"scores": {"score": score}}))
        run.folder.rename(run.folder.with_name(run_name(method, seed) + "."))
    for path in (folder / FLICKR).glob("*."):
        path.rename(path.with_name(path.name.rstrip(".")))


def test_seeds_are_averaged_and_compared_pair_by_pair(tmp_path):
    made_up(tmp_path, "fine-tune", [70.0, 80.0, 90.0])
    made_up(tmp_path, "mdgd", [71.0, 82.0, 93.0])
    runs = read_seeds(tmp_path)[FLICKR]
    assert [run.seed for run in runs["mdgd"]] == [0, 1, 2]
    table = seed_table("x", runs, published()[FLICKR].tasks)
    rows = {cells[0]: dict(zip(table.columns, cells, strict=True)) for cells in table.rows}
    # Student's t of two degrees of freedom: 4.303 · 10 / √3, and 4.303 · 1 / √3 for the differences 1, 2, 3.
    assert rows["Fine-tune"]["T"] == "80.0 ± 24.8"
    assert rows["MDGD"]["T"] == "82.0 ± 27.3"
    assert rows["MDGD"]["T against Fine-tune"] == "+2.0 ± 2.5"
    assert rows["Fine-tune"]["T against Fine-tune"] == "–"
    assert len(table.notes) == 1
    path = tmp_path / FLICKR / "mdgd-seed1" / "config.json"
    config = json.loads(path.read_text())
    config["configuration"]["training"]["learning_rate"] = 1e-5
    config["configuration"]["methods"]["mdgd"]["align"] = 7.0
    path.write_text(json.dumps(config))
    (_, note) = seed_table("x", read_seeds(tmp_path)[FLICKR], published()[FLICKR].tasks).notes
    assert note.endswith("mdgd-seed1 (training.learning_rate, mdgd.align).")
    shown = call("table", "--results", tmp_path).output
    assert "MDGD, 3 seeds" in shown
    assert "± 95 %" in shown


def test_tuning_looks_at_validation_examples_alone_with_one_budget_for_all(assets, tmp_path):
    experiment = assets.experiment("minicpm-pathvqa", [*SHORT, "training.steps=1", "evaluation.examples=2"])
    found = tune.tune(experiment, ["fine-tune-lv"], tmp_path, smoke=True, console=QUIET)
    assert {name: len(tried["candidates"]) for name, tried in found.items()} == {"fine-tune-lv": 4}
    for tried in found.values():
        best = max(tried["candidates"], key=lambda one: one["H"])
        assert tried["chosen"] == best["settings"]
    written = json.loads((tmp_path / "minicpm-pathvqa.tuning.json").read_text())
    assert written["methods"]["fine-tune-lv"]["chosen"] == found["fine-tune-lv"]["chosen"]
    work = Workshop(tune.on_validation(experiment), CPU)
    measured = Workshop(experiment, CPU)
    for task in work.experiment.tasks:
        seen = {(x.id, x.question, x.image.tobytes()) for x in work.examples(task, DATASETS[task].validation)}
        assert {(x.id, x.question, x.image.tobytes()) for x in work.evaluation_examples(task)} <= seen
        assert not seen & {
            (x.id, x.question, x.image.tobytes()) for x in measured.examples(task, DATASETS[task].evaluation)
        }


def test_as_many_candidates_for_every_method_and_no_two_alike():
    experiment = load_experiment("minicpm-pathvqa")
    for name in METHODS:
        if METHODS[name].trains:
            found = [json.dumps(x, sort_keys=True) for x in tune.candidates(experiment, name)]
            assert len(set(found)) == tune.CANDIDATES, name
    with pytest.raises(ConfigError, match="okvqa has no validation split to tune on"):
        tune.on_validation(load_experiment("llava-okvqa"))


def test_the_oracle_scores_100_wherever_a_right_answer_does(assets, tmp_path):
    for name in experiment_names():
        folder = oracle.run_oracle(assets.experiment(name, EXACT), tmp_path, QUIET)
        for path in (folder / "evaluation").glob("*.json"):
            found = json.loads(path.read_text())
            score, other = found["scores"]["score"], found["scores"].get("rouge_l")
            # CIDEr of one of five references is no round number, but the caption is one of them.
            assert (other == pytest.approx(100) and score > 100) if found["metric"] == "cider" else score == 100, path


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("model", ["llava-1.5-7b", "minicpm-v-2", "qwen3-vl-2b", "internvl3.5-1b", "smolvlm2-2.2b"])
def test_an_export_is_loaded_by_its_path_alone(model, assets, tmp_path):
    experiment = assets.experiment("minicpm-pathvqa", [*SHORT, f'model="{model}"', "training.steps=1"])
    run = run_row(experiment, "fine-tune", tmp_path, smoke=True, device=CPU, console=QUIET)
    told = export_run(run, tmp_path / "export")
    own_code = model == "minicpm-v-2"
    assert (f"vllm serve {tmp_path / 'export'}" in told) == (not own_code)
    assert ("AutoModel.from_pretrained" in told) == own_code
    published, exported = assets.model(model), tmp_path / "export"
    for file in published.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            assert (exported / file.name).read_bytes() == file.read_bytes(), "as other programs know it"
    names = [load_file(folder / "model.safetensors").keys() for folder in (published, exported)]
    assert names[0] == names[1], "weights too"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (published, exported))
    dtypes = {key: value for key, value in after.items() if key in ("dtype", "torch_dtype")}
    assert set(dtypes.values()) == {"float32"}
    assert {**before, **dtypes}.keys() == after.keys()
    assert before.get("architectures") == after.get("architectures")
    again = load_model(model, tmp_path / "export", "float32", CPU)
    trained = load_file(run / "trained.safetensors")
    own = dict(again.network.named_parameters())
    for name, value in trained.items():
        torch.testing.assert_close(own[name].detach(), value)
    if not own_code:
        network = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
        assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in own.values())
    if model == "llava-1.5-7b":
        ask_by_the_processor(exported, again)
        assert "vision_tower.vision_model.pre_layrnorm.weight" in names[1], "as vLLM wants it"
    if model == "qwen3-vl-2b":
        assert again.tokenizer.pad_token is not None, "lmms-eval asks for padding"
    with pytest.raises(ConfigError, match="is not empty: choose another folder"):
        export_run(run, tmp_path / "export")


def ask_by_the_processor(folder, model):
    """As other programs do: the chat template, and the processor's own number of tokens for a picture."""
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    asked = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "USER: <image>\nWhat? ASSISTANT:"
    seen = processor(images=Image.new("RGB", (30, 20)), text=text, return_tensors="pt")
    assert (seen["input_ids"] == model.network.config.image_token_id).sum() == model.image_tokens
    assert model.network(**seen).logits.isfinite().all()


def test_what_is_no_run_is_not_exported(tmp_path):
    done = call("export", tmp_path, "--output", tmp_path / "x")
    assert (done.exit_code, f"{tmp_path} holds no run" in " ".join(done.output.split())) == (2, True)


def test_every_caption_can_be_taught(assets):
    one, five = (
        Workshop(assets.experiment("llava-flickr30k", [f"training.captions={n}"]), CPU).training_examples()
        for n in (1, 5)
    )
    assert len(five) == 5 * len(one)
    assert [x.target for x in (five[i] for i in range(5))] == list(one[0].answers)
    assert five[5].id == one[1].id


def test_the_cluster_example_runs_every_experiment():
    script = Path(tune.__file__).parents[1] / "slurm.sbatch"
    assert f"EXPERIMENTS=({' '.join(experiment_names())})" in script.read_text()
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", script], check=True)

"""Experiments as files: what they say, what the command line lays over them, and what is refused."""

import pytest

from reproductions.methods import METHODS
from reproductions.paper.config import experiment_names, load_experiment, methods_of
from reproductions.paper.report.published import published
from reproductions.shared.fields import ConfigError

GOOD = """
title = "a title"
model = "llava-1.5-7b"
layers = 6
target = "okvqa"
pretrained = ["gqa"]
"""


def write(folder, text):
    path = folder / "own.toml"
    path.write_text(text)
    return path


def test_the_experiments_are_those_of_the_tables():
    assert experiment_names() == list(published())
    for name, table in published().items():
        experiment = load_experiment(name)
        assert experiment.tasks == table.tasks
        assert methods_of(experiment.model) == list(table.rows)
        assert experiment.layers == (6 if table.table == 1 else 8)


def test_a_step_is_as_many_examples_as_model_tailors():
    sizes = {name: load_experiment(name).training for name in experiment_names()}
    assert sizes["llava-flickr30k"].batch * sizes["llava-flickr30k"].accumulation == 16 * 4
    assert sizes["llava-okvqa"].batch * sizes["llava-okvqa"].accumulation == 16 * 6
    assert {t.learning_rate for t in sizes.values()} == {1e-4}


def test_a_file_of_ones_own_is_named_after_itself(tmp_path):
    experiment = load_experiment(write(tmp_path, GOOD))
    assert (experiment.name, experiment.tasks, experiment.training.epochs) == ("own", ("gqa", "okvqa"), 1.0)


def test_the_command_line_lays_values_over_the_file(tmp_path):
    experiment = load_experiment(
        write(tmp_path, GOOD),
        ["training.learning_rate=1e-5", "training.report_to=tensorboard", "methods.mdgd.align=10", "seed=3",
         'pretrained=["pope", "gqa"]', "data.options.textvqa.ocr=false"],
    )  # fmt: skip
    assert (experiment.training.learning_rate, experiment.training.report_to) == (1e-5, "tensorboard")
    assert experiment.methods["mdgd"]["align"] == 10
    assert (experiment.seed, experiment.pretrained) == (3, ("pope", "gqa"))
    assert experiment.data.options["textvqa"] == {"ocr": False}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=1", "unknown key training.epoch; there are epochs"),
        ("training.batch=1.5", "training.batch must be int, got 1.5"),
        ("training.batch=0", "training.batch must be at least 1, got 0"),
        ("training.warmup=1.5", "training.warmup must be at least 0 and at most 1, got 1.5"),
        ("training.checkpointing=1", "training.checkpointing must be bool, got 1"),
        ("training=1", "training must be a table, got 1"),
        ("dtype=float16", "dtype must be one of bfloat16, float32, got 'float16'"),
        ("model=llava", "model must be one of llava-1.5-7b, .*, got 'llava'"),
        ("pretrained=gqa", "pretrained must be a list of str, got 'gqa'"),
        ("pretrained=[]", r"pretrained must be a list of str, got \[\]"),
        ("masking.ratios=[0.5, 2.0]", "masking.ratios must be .* at most 1, got 2.0"),
        ("target=vqav2", "target: no data set 'vqav2'; there are gqa"),
        ("target=pope", "target: pope has no training split"),
        ("methods.mgdg.align=1", "methods: no method 'mgdg'; there are zero-shot"),
        ("methods.mdgd.alpha=1", "unknown key methods.mdgd.alpha; there are learning_rate, align"),
        ("methods.mdgd.align=-1", "methods.mdgd.align must be at least 0, got -1"),
        ("methods.model-tailor.sign=plus", "methods.model-tailor.sign must be one of subtract, add, got 'plus'"),
        ("training.epochs=0", "training.epochs and training.steps are both 0"),
        ("data.options.pope.ocr=false", "unknown key data.options.pope.ocr; there are none"),
        ("data.options.textvqa.ocr=no", "data.options.textvqa.ocr must be bool, got 'no'"),
        ("data.options.textvqa=no", "data.options.textvqa must be a table, got 'no'"),
        ("methods.mdgd.align=inf", "methods.mdgd.align must be a finite number, got inf"),
        ("data.source=/no/such", "data.source: there is no folder /no/such"),
        ("source=/no/such", "source: /no/such is no folder with a config.json"),
        ("seed", "--set: 'seed' is not of the form key=value"),
    ],
)
def test_what_is_refused_is_named_with_its_file(override, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        load_experiment(write(tmp_path, GOOD), [override])
    assert "own.toml" in str(caught.value) or "--set" in str(caught.value)


def test_another_model_is_another_experiment(tmp_path):
    path = write(tmp_path, GOOD)
    assert load_experiment(path, ["model=llava-1.5-7b"]).name == "own"
    other = load_experiment(path, ["model=minicpm-v-4.6"])
    assert (other.name, other.title) == ("own-minicpm-v-4.6", "a title, with minicpm-v-4.6")
    assert load_experiment(path, ["model=minicpm-v-4.6", "name=mine"]).name == "mine"


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"own.toml: layers is missing"):
        load_experiment(write(tmp_path, GOOD.replace("layers = 6\n", "")))
    with pytest.raises(ConfigError, match=r"own.toml: pretrained is missing"):
        load_experiment(write(tmp_path, GOOD.replace('pretrained = ["gqa"]\n', "")))


def test_a_broken_file_and_an_unknown_name_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"own.toml: not TOML"):
        load_experiment(write(tmp_path, "a = = 1"))
    with pytest.raises(ConfigError, match="no experiment 'llava'; there are llava-flickr30k"):
        load_experiment("llava")


def test_every_method_has_settings_with_a_learning_rate_of_its_own():
    for name, method in METHODS.items():
        assert method.Settings().learning_rate == 0
        assert method.name == name

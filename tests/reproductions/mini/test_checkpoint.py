"""The committed checkpoint is what it says: small, licensed, loadable offline, and able to see."""

import json
import shlex

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from reproductions.__main__ import app
from reproductions.mini.model import pretrain
from reproductions.mini.model.checkpoint import CHECKPOINT, CHECKPOINTS, SECOND_CHECKPOINT, command, load_checkpoint
from reproductions.mini.model.evaluate import evaluate
from reproductions.mini.model.settings import PRETRAIN, PretrainSettings
from reproductions.mini.world.data import pretrained_task_data, target_data
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.mini.world.text import make_tokenizer

BOTH = pytest.mark.parametrize("path", [CHECKPOINT, SECOND_CHECKPOINT], ids=lambda path: path.name)


@BOTH
@pytest.mark.parametrize("task", PRETRAINED_TASKS)
def test_every_pretrained_task_is_far_above_chance(path, task):
    score = evaluate(*load_checkpoint(path), pretrained_task_data(task, "test", 40))
    # At least three quarters of the way from guessing to perfect.
    enough = PRETRAINED_TASKS[task].chance + 0.75 * (100 - PRETRAINED_TASKS[task].chance)
    assert score.exact >= enough
    assert score.restricted >= score.exact


@BOTH
@pytest.mark.parametrize("target", ["digits", "caption"])
def test_targets_are_not_known_yet(path, target):
    assert evaluate(*load_checkpoint(path), target_data(target, "test", 40)).exact < 15


@BOTH
def test_files_are_small_and_attributed(path):
    assert (path / "model.safetensors").stat().st_size < 15_000_000
    licence = (path / "LICENSE.md").read_text()
    assert "OpenMoji" in licence
    assert "CC BY-SA 4.0" in licence


@BOTH
def test_weights_are_finite_float32(path):
    with safe_open(path / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a dict
            assert weights.get_tensor(name).dtype == torch.float32
            assert weights.get_tensor(name).isfinite().all()


@pytest.mark.parametrize(
    ("path", "settings"), [(CHECKPOINT, PRETRAIN), (SECOND_CHECKPOINT, PretrainSettings(seed=3, language_steps=1800))]
)
def test_the_checkpoint_belongs_to_this_code(path, settings):
    assert load_checkpoint(path)[1].get_vocab() == make_tokenizer().get_vocab()
    report = json.loads((path / "training.json").read_text())
    assert PretrainSettings(**report["settings"]) == settings


@pytest.mark.parametrize("path", [*CHECKPOINTS["llava"], *CHECKPOINTS["smolvlm"]], ids=lambda path: path.name)
def test_the_command_that_is_named_for_a_checkpoint_makes_it(path, monkeypatch):
    asked = []

    def noted(output, settings, *args, **options):
        asked.append((output, settings))
        return {"validation": {"exact": {}}, "seconds": 0}

    monkeypatch.setattr(pretrain, "pretrain", noted)
    python, option, module, *words = shlex.split(command(path))
    assert (python, option, module) == ("python", "-m", "reproductions")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    report = json.loads((path / "training.json").read_text())
    assert asked == [(path, PretrainSettings(**report["settings"]))]


def test_the_checkpoints_are_independent():
    one, other = (load_checkpoint(path)[0].state_dict() for path in (CHECKPOINT, SECOND_CHECKPOINT))
    assert not any(torch.equal(one[name], other[name]) for name in one if "projector" in name)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_checkpoint(tmp_path)

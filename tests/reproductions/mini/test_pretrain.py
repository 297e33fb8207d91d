"""Pre-training runs end to end, is a function of its settings, and survives being killed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from reproductions.__main__ import app
from reproductions.mini.model.checkpoint import load_checkpoint
from reproductions.mini.model.pretrain import pretrain
from reproductions.mini.model.settings import PretrainSettings
from reproductions.mini.world import curriculum
from reproductions.mini.world.curriculum import DRAWINGS, LanguageBatches, VisionBatches
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.mini.world.scenes import Scene

TINY = PretrainSettings(vision_steps=4, language_steps=9, vision_batch=4, language_batch=4)


class KilledError(Exception):
    pass


def run(output, settings=TINY, kill_at=None, workers=0):
    seen = []

    def progress(stage, step, loss, accuracies):
        seen.append((stage, step, loss))
        if (stage, step) == kill_at:
            raise KilledError

    pretrain(output, settings, progress, workers, resume_every=2, check_every=5, check_examples=2, final_examples=2)
    return load_file(output / "model.safetensors"), seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def test_it_shows_every_step(whole):
    shown = [(stage, step) for stage, step, _ in whole[1]]
    assert shown == [("vision", step) for step in range(1, 5)] + [("language", step) for step in range(1, 10)]


# Before the first resume file, within a stage, between the two, and within the second.
@pytest.mark.parametrize("kill_at", [("vision", 1), ("vision", 3), ("language", 1), ("language", 7)])
def test_a_killed_run_goes_on_to_the_same_weights(whole, tmp_path, kill_at):
    with pytest.raises(KilledError):
        run(tmp_path, kill_at=kill_at)
    assert not (tmp_path / "model.safetensors").exists()
    weights, seen = run(tmp_path)
    assert seen == whole[1][-len(seen) :]
    # Resume files are written every two steps, so at most two are repeated and the finished ones are not.
    assert len(seen) <= len(whole[1]) - whole[1].index(next(s for s in whole[1] if s[:2] == kill_at)) + 1
    assert_equal(weights, whole[0])
    assert not (tmp_path / "resume.pt").exists()


def test_another_process_draws_the_same_pictures(whole, tmp_path):
    assert_equal(run(tmp_path, workers=1)[0], whole[0])


def test_another_seed_gives_other_weights(whole, tmp_path):
    weights = run(tmp_path, PretrainSettings(1, 1, 1, 4, 4))[0]
    assert all(not torch.equal(weights[name], whole[0][name]) for name in weights if weights[name].ndim > 1)


def test_products_in_bfloat16_are_coarser_and_the_weights_are_not(whole, tmp_path):
    weights, seen = run(tmp_path, replace(TINY, autocast=True))
    first, exact = seen[0][2], whole[1][0][2]
    assert abs(first - exact) > 1e-5 * exact, "more than another order of sums makes"
    assert first == pytest.approx(exact, rel=0.05)
    assert all(x.dtype == torch.float32 for x in weights.values())


def test_a_resume_file_of_other_settings_is_refused(tmp_path):
    with pytest.raises(KilledError):
        run(tmp_path, kill_at=("vision", 3))
    with pytest.raises(ValueError, match=r"resume\.pt"):
        run(tmp_path, PretrainSettings(seed=1))


def test_the_number_of_threads_is_put_back(tmp_path):
    torch.set_num_threads(2)
    try:
        run(tmp_path, PretrainSettings(0, 1, 1, 2, 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_command_writes_a_checkpoint_and_a_report(tmp_path):
    sizes = ["--vision-steps", "1", "--language-steps", "1", "--workers", "0", "--examples", "2"]
    result = CliRunner().invoke(app, ["mini", "pretrain", "--output", str(tmp_path), *sizes])
    assert result.exit_code == 0, result.output
    load_checkpoint(tmp_path)
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["settings"]["language_steps"] == 1
    assert set(report["validation"]["exact"]) == set(PRETRAINED_TASKS)
    assert report["seconds"] > 0


def test_only_training_scenes_are_shown(monkeypatch, tokenizer):
    shown = []

    def spy(cells, background, rng):
        shown.append(Scene(cells, background))
        return draw(cells, background, rng)

    draw = curriculum.draw_picture
    monkeypatch.setattr(curriculum, "draw_picture", spy)
    for step in (0, 7, 9):
        VisionBatches(0, 10, 40)[step]
        LanguageBatches(tokenizer, 0, 10, 40)[step]
    assert len(shown) == 5 * 40
    assert {scene.split for scene in shown} == {"train"}


def test_labels_of_the_vision_stage_name_the_cells():
    batch = VisionBatches(0, 1, 6)[0]
    assert batch["pixel_values"].shape == (6, 3, 48, 48)
    for picture, drawings in zip(batch["pixel_values"], batch["drawings"], strict=True):
        cells = [picture[:, y : y + 24, x : x + 24] for y in (0, 24) for x in (0, 24)]
        plain = [bool((cell == cell[:, :1, :1]).all()) for cell in cells]
        assert plain == [DRAWINGS[drawing] == "" for drawing in drawings.tolist()]


def assert_equal(weights, expected):
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name

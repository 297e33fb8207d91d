"""Another architecture, facts without a picture, a third target, and several targets in a row."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from reproductions.mini.experiment import finetune as finetuning
from reproductions.mini.experiment import run as running
from reproductions.mini.experiment import study
from reproductions.mini.experiment.calibration import prompts
from reproductions.mini.experiment.cells import ALL_CELLS, CELLS, SEQUENCES, WIDER, cells_of
from reproductions.mini.experiment.finetune import exchanged, finetune, prepare
from reproductions.mini.experiment.methods import Method
from reproductions.mini.experiment.outcomes import CellOutcomes, Outcome
from reproductions.mini.experiment.run import execute
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.model.architectures import ARCHITECTURES
from reproductions.mini.model.checkpoint import CHECKPOINTS, knows_facts, load_checkpoint
from reproductions.mini.model.evaluate import evaluate, visual_features
from reproductions.mini.model.pretrain import pretrain
from reproductions.mini.model.settings import RECIPES, PretrainSettings
from reproductions.mini.report.tables import score_table
from reproductions.mini.world.curriculum import LanguageBatches
from reproductions.mini.world.data import (
    pretrained_task_data,
    prompt_batch,
    target_data,
    text_task_data,
    training_batch,
)
from reproductions.mini.world.language import TEXT_TASKS
from reproductions.mini.world.pictures import KINDS, LETTERS
from reproductions.mini.world.questions import NUMBERS
from reproductions.mini.world.scenes import SPLITS
from torch_mdgd import VisualTap

TINY = PretrainSettings(vision_steps=1, language_steps=9, vision_batch=2, language_batch=4, facts=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a SmolVLM that was hardly pre-trained."""
    folder = tmp_path_factory.mktemp("smolvlm")
    pretrain(folder, replace(TINY, architecture="smolvlm"), workers=0, final_examples=2)
    return folder


def test_its_checkpoint_is_rounded_and_loads_as_float32(small):
    weights, (model, _) = load_file(small / "model.safetensors"), load_checkpoint(small)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert all(torch.equal(value, weights[name].float()) for name, value in model.named_parameters())
    assert (small / "model.safetensors").stat().st_size < 4e6
    report = json.loads((small / "training.json").read_text())
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert set(TEXT_TASKS) < set(report["validation"]["exact"])
    assert knows_facts(small)
    assert not knows_facts(CHECKPOINTS["llava"][0])


@pytest.mark.parametrize(
    "make", [lambda: pretrained_task_data("existence", "validation", 6), lambda: text_task_data("sum")[:6]]
)
def test_its_answers_do_not_depend_on_what_else_is_asked(small, make):
    model, tokenizer = load_checkpoint(small)
    data = make()
    together = [evaluate(model, tokenizer, data, batch_size=size).predictions for size in (6, 1)]
    assert together[0] == together[1]
    longer = pretrained_task_data("choice", "validation", 1).examples[0]
    rows = [example for example in data.examples if example.picture.size] or [longer]
    alone, beside = (prompt_batch(examples, tokenizer) for examples in (rows[:1], [rows[0], longer]))
    with torch.no_grad():
        last = [model(**batch).logits[0, -1] for batch in (alone, beside)]
    torch.testing.assert_close(*last, atol=1e-4, rtol=1e-4)


def test_its_features_are_tapped_where_its_pictures_are(small):
    model, tokenizer = load_checkpoint(small)
    batch = training_batch(pretrained_task_data("object", "test", 2).examples, tokenizer)
    tap = VisualTap.for_model(model)
    assert tap.check(model, batch)
    z = tap.features(model, batch)
    assert z.shape == (2 * 16, 128)
    torch.testing.assert_close(z, visual_features(model, batch))
    other = batch | {"pixel_values": batch["pixel_values"].roll(1, 0)}
    assert not torch.allclose(z, tap.features(model, other))


@pytest.mark.parametrize("name", ["fine-tune", "align", "anchor", "lora-all", "lora-anchor", "attention", "gate-up"])
def test_the_systems_train_it(small, name, monkeypatch):
    monkeypatch.setattr(finetuning, "prompts", lambda *args, **sizes: prompts(*args, batches=1, size=4))
    model, tokenizer = load_checkpoint(small)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = SYSTEMS[name].method
    finetune(model, tokenizer, target_data("digits", "train", 16), method, seed=0, steps=2, batch_size=2)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not any("vision_model" in n for n in moved)
    assert any("text_model.layers.3." in n for n in moved)
    assert any("text_model.layers.0." in n for n in moved) is (method.lora > 0)
    assert any("connector" in n for n in moved) is (method.trained == "last")


def test_the_large_model_has_ten_million_numbers(tokenizer):
    with torch.device("meta"):
        model = ARCHITECTURES["llava-10m"].build(tokenizer)
    assert 9e6 < sum(p.numel() for p in model.parameters()) < 11e6
    assert set(RECIPES) == set(ARCHITECTURES) == set(CHECKPOINTS)
    assert all(RECIPES[name].architecture == name for name in RECIPES)


def test_a_result_tells_what_it_began_with_and_what_became_of_facts(small):
    threads = torch.get_num_threads()
    cell = WIDER[1]
    (run,) = study.runs_of(cell, [SYSTEMS["fine-tune"].method], [3], study.Size(steps=1, batch=2, examples=2))
    assert (cell.architecture, run.checkpoint) == ("smolvlm", CHECKPOINTS["smolvlm"][1])
    assert json.loads(run.key)["checkpoint"] == "smolvlm-1"
    found = execute(replace(run, checkpoint=small, record="scores"))
    torch.set_num_threads(threads)
    assert (found["architecture"], found["checkpoint"]) == ("smolvlm", small.name)
    assert found["P_facts"] == pytest.approx(np.mean(list(found["facts"]["exact"].values())))
    assert set(found["facts"]["restricted"]) == set(TEXT_TASKS)
    assert not set(TEXT_TASKS) & set(found["exact"])
    outcome = Outcome(SYSTEMS["fine-tune"], run.method, {3: found}, ())
    table = score_table(CellOutcomes(cell, {"fine-tune": outcome}, (), {}, {}, {}, {}))
    assert table.rows[0][table.columns.index("P of facts")] == f"{found['P_facts']:.1f}"


def right_answer(task, question):
    """Worked out from the words of the question."""
    words = question.removesuffix(" ?").split()
    if task == "sum":
        return NUMBERS[sum(NUMBERS.index(word) for word in words if word in NUMBERS)]
    if task == "series":
        last = LETTERS.index(words[2])
        assert LETTERS[last - 1] == words[0]
        return LETTERS[last + 1]
    return next(kind for kind, drawings in KINDS.items() if words[-1] in drawings)


@pytest.mark.parametrize(("task", "count"), [("sum", 55), ("series", 20), ("sort", 32)])
def test_facts_are_right_and_each_is_asked_once(task, count, tokenizer):
    data = text_task_data(task)
    assert len({example.question for example in data}) == len(data) == count
    for example in data:
        assert example.answer == right_answer(task, example.question)
        assert example.answer in data.answers
    batch = training_batch(data.examples, tokenizer)
    assert "pixel_values" not in batch
    assert not (batch["input_ids"] == tokenizer.get_vocab()["<image>"]).any()


def test_pre_training_tells_facts_only_where_it_is_to(tokenizer):
    with_facts, without = (LanguageBatches(tokenizer, 0, 9, 4, facts) for facts in (True, False))
    told = [tokenizer.batch_decode(batches[7]["input_ids"]) for batches in (with_facts, without)]
    assert all(row.count("<q>") == 4 and row.count("repeat") == 1 for row in told[0])
    assert all(row.count("<q>") == row.count("repeat") == 1 for row in told[1])
    pictured = [batches[0]["pixel_values"] for batches in (with_facts, without)]
    assert torch.equal(*pictured)


def test_a_batch_has_pictures_or_none(tokenizer):
    mixed = [text_task_data("sum")[0], pretrained_task_data("count", "train", 1)[0]]
    for make in (training_batch, prompt_batch):
        with pytest.raises(ValueError, match="1 of 2"):
            make(mixed, tokenizer)
    with pytest.raises(ValueError, match="task must be one of sum"):
        text_task_data("count")


def test_tiles_are_counted_right_and_splits_do_not_meet():
    paint = {"red": (230, 40, 40), "green": (40, 190, 60), "blue": (60, 90, 240), "yellow": (245, 215, 40)}
    seen = {split: target_data("tiles", split, 120, seed) for seed, split in enumerate(SPLITS)}
    for data in seen.values():
        assert {example.answer for example in data} == set(data.answers) == set(NUMBERS[:6])
        for example in data:
            asked = example.question.removeprefix("how many ").removesuffix(" things are shown ?")
            painted = (example.picture == np.array(paint[asked])[:, None, None]).all(0)
            places = painted.reshape(4, 12, 4, 12).any((1, 3)).sum()
            assert example.answer == NUMBERS[places]
    boards = [{example.source.colours for example in data} for data in seen.values()]
    assert not (boards[0] & boards[1] | boards[0] & boards[2] | boards[1] & boards[2])


def test_a_kept_reference_is_what_everything_about_phi_is_made_at(small, monkeypatch):
    model, tokenizer = load_checkpoint(small)
    reference = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    present = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped, seen = Method.optimizer, []

    def noted(self, model, *args):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return wrapped(self, model, *args)

    monkeypatch.setattr(Method, "optimizer", noted)
    still = SYSTEMS["mdgd"].method.with_settings(learning_rate=0.0)
    data = target_data("digits", "train", 8)
    for phi, expected in ((reference, reference), (None, present)):
        finetune(model, tokenizer, data, still, seed=0, steps=1, batch_size=2, reference=phi)
        assert all(torch.equal(seen[-1][name], value) for name, value in expected.items())
        assert all(torch.equal(p, present[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, present[name]) for name, value in exchanged(model, reference).items())
    wise = SYSTEMS["wise-ft"].method.with_settings(learning_rate=0.0, mix=0.0)
    finetune(model, tokenizer, data, wise, seed=0, steps=1, batch_size=2, reference=present)
    kept = {name for name, p in model.named_parameters() if torch.equal(p, present[name])}
    assert kept == {name for name, p in prepare(model, wise)[0].named_parameters() if p.requires_grad}


def test_three_targets_in_a_row_are_all_asked_for(monkeypatch):
    words = {"digits": 12.5, "caption": 25.0}
    monkeypatch.setattr(running, "evaluate", lambda model, tokenizer, data: SimpleNamespace(words=words[data.task]))
    threads = torch.get_num_threads()
    place = SEQUENCES[1]
    size = study.Size(steps=1, batch=2, examples=2)
    (run,) = study.runs_of(place, [SYSTEMS["align"].method], [0], size)
    assert json.loads(run.key)["first"] == ["digits", "caption"]
    found = execute(replace(run, record="scores"))
    torch.set_num_threads(threads)
    assert (found["target"], found["T_first"], found["T_second"]) == ("tiles", 12.5, 25.0)
    assert place.title == "digits then captions then tiles, AdamW, φ kept"
    with pytest.raises(ValueError, match="adapters of lora-all"):
        execute(replace(run, method=SYSTEMS["lora-all"].method))
    fitting = {name for name, system in SYSTEMS.items() if system.fits(place)}
    assert {name for name in SYSTEMS if name not in fitting} == {
        n for n, system in SYSTEMS.items() if system.method.lora
    }
    assert all(system.fits(SEQUENCES[0]) for system in SYSTEMS.values())


def test_a_model_that_is_not_there_is_named_with_the_command_that_makes_it(monkeypatch, tmp_path):
    monkeypatch.setitem(CHECKPOINTS, "smolvlm", (tmp_path / "0", tmp_path / "1"))
    with pytest.raises(FileNotFoundError, match=f"--architecture smolvlm --output {tmp_path}/0` makes one"):
        study.study(tmp_path, [WIDER[1]], [], [0], study.STAGES, study.Size(), Console())
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        FileNotFoundError, match=f"--architecture smolvlm --seed 3 --language-steps 1800 --output {tmp_path}/1` makes"
    ):
        load_checkpoint(tmp_path / "1")


def test_cells_are_found_by_what_they_are():
    assert cells_of("llava", sequence=False, target=None, base=None) == list(CELLS)
    assert cells_of("llava", sequence=True, target=None, base=None) == list(SEQUENCES)
    assert [c.name for c in cells_of("smolvlm", False, None, None)] == ["digits-adamw-smolvlm", "caption-adamw-smolvlm"]
    assert [c.title for c in cells_of("llava", False, "tiles", None)] == ["tiles, AdamW"]
    assert [c.title for c in cells_of("llava", False, "caption", None, long=True)] == ["captions, AdamW, 900 steps"]
    assert len({cell.name for cell in ALL_CELLS}) == len({cell.title for cell in ALL_CELLS}) == len(ALL_CELLS)
    with pytest.raises(ValueError, match="no cell of smolvlm"):
        cells_of("smolvlm", False, "tiles", None)

"""Rows of the tables from end to end on tiny models: what they leave, and what is measured."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reproductions.paper.config import load_experiment
from reproductions.paper.data import DATASETS, DataError, Example
from reproductions.paper.models import ModelError
from reproductions.paper.report.results import Result
from reproductions.paper.run import evaluate, masking
from reproductions.paper.run.room import require_room_for_rows, require_room_to_fetch
from reproductions.paper.run.row import run_row
from reproductions.paper.run.weights import NAME, changes, load_changes, save_changes
from reproductions.paper.run.work import Workshop
from reproductions.shared.fields import ConfigError
from reproductions.shared.files import FileError, read_until_cut
from tests.properties import assert_same_bits
from tests.reproductions.paper.running import CPU, EXACT, SHORT, contents, row


@pytest.fixture(scope="module")
def whole(assets, tmp_path_factory):
    """An uninterrupted row of MDGD."""
    return row(assets, tmp_path_factory.mktemp("whole"), "mdgd")


def test_a_row_leaves_everything_that_is_read_later(whole):
    assert json.loads((whole / "status.json").read_text())["stage"] == "done"
    config = json.loads((whole / "config.json").read_text())
    assert config["configuration"]["training"]["steps"] == 3
    assert (config["method"], config["smoke"], config["device"] is not None) == ("mdgd", True, True)
    assert {"torch", "transformers"} <= set(config["versions"])
    lines = [json.loads(line) for line in (whole / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert {"loss", "visual_loss", "cos_task_visual", "cos_task_reference"} <= set(line)
    assert lines[0]["visual_loss"] == 0 < lines[2]["visual_loss"]
    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert {"train/loss", "train/visual_loss"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3]
    for task in ("textvqa", "okvqa"):
        result = json.loads((whole / "evaluation" / f"{task}.json").read_text())
        assert next(iter(result["scores"])) == "score"
        assert result["metric"] == DATASETS[task].metric
        assert 1 <= result["effective_rank"] <= 16
        predictions = [json.loads(x) for x in (whole / "evaluation" / f"{task}.predictions.jsonl").open()]
        assert len(predictions) == result["n"] == 3
        assert all(set(p) == {"id", "question", "answers", "prediction", "score"} for p in predictions)
        assert sum(p["score"] for p in predictions) / 3 == pytest.approx(result["scores"]["score"])
        features = load_file(whole / "features" / f"{task}.safetensors")
        assert {name: x.shape for name, x in features.items()} == {"visual": (3, 16), "multimodal": (3, 16)}
        assert not torch.equal(features["visual"], features["multimodal"])
        assert (whole / "evaluation" / f"{task}.pictures" / "0.jpg").read_bytes()[:2] == b"\xff\xd8"
    assert not (whole / "checkpoints").exists()


def test_a_row_that_is_done_is_not_touched(whole, assets):
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    row(assets, whole.parent.parent, "mdgd")
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == times


def test_another_configuration_is_refused_in_the_same_folder(whole, assets):
    with pytest.raises(ConfigError, match=r"another configuration \(training.learning_rate, methods.mdgd.align\)"):
        row(assets, whole.parent.parent, "mdgd", "training.learning_rate=1.0", "methods.mdgd.align=3.0")
    # What another method is set to does not matter here.
    row(assets, whole.parent.parent, "mdgd", "methods.lora.rank=5")


def test_where_data_lie_may_change_between_calls(whole, assets, tmp_path):
    experiment = assets.experiment("llava-okvqa", SHORT)
    moved = replace(experiment, data=replace(experiment.data, source=str(tmp_path)))
    assert run_row(moved, "mdgd", whole.parent.parent, smoke=True, device=CPU) == whole
    with pytest.raises(ConfigError, match=r"another configuration \(source\)"):
        run_row(replace(experiment, source=str(tmp_path)), "mdgd", whole.parent.parent, smoke=True, device=CPU)


def test_a_real_run_is_refused_in_the_folder_of_a_smoke_run(whole, assets):
    experiment = assets.experiment("llava-okvqa", SHORT)
    with pytest.raises(ConfigError, match=r"another configuration \(smoke\)"):
        run_row(experiment, "mdgd", whole.parent.parent, device=CPU)


def test_what_is_measured_is_what_is_on_disk(assets, tmp_path, monkeypatch):
    """The Trainer leaves a network that computes under autocast, without a cache; a resumed run would not have it."""
    measured = []

    def look(work, task, folder, bars):
        batch = work.model.collate(work.evaluation_examples(task)[:1], answers=False)
        measured.append((work.network(**batch).logits.dtype, getattr(work.network.config, "use_cache", True)))
        return {"scores": {"score": 0.0}, "effective_rank": 1.0}

    monkeypatch.setattr("reproductions.paper.run.row.evaluate", look)
    row(assets, tmp_path, "fine-tune", "dtype=bfloat16", "training.steps=1")
    assert measured == 2 * [(torch.bfloat16, True)]


def test_a_typo_is_not_remembered(assets, tmp_path):
    """A first call with it leaves a configuration, which the next call may set right."""
    experiment = assets.experiment("llava-okvqa", SHORT)
    with pytest.raises(ModelError, match="could not read /nonexistent"):
        run_row(replace(experiment, source="/nonexistent"), "zero-shot", tmp_path, smoke=True, device=CPU)
    folder = row(assets, tmp_path, "zero-shot")
    config = json.loads((folder / "config.json").read_text())["configuration"]
    assert config["source"] == str(assets.model("llava-1.5-7b"))
    with pytest.raises(ConfigError, match="another configuration"):
        run_row(replace(experiment, source="/nonexistent"), "zero-shot", tmp_path, smoke=True, device=CPU)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("evaluation/okvqa.json", "a JSON file"),
        ("status.json", "a JSON file"),
        ("config.json", "a JSON file"),
        ("trained.safetensors", "a whole safetensors file"),
    ],
)
def test_a_broken_file_of_a_finished_row_is_named(file, kind, whole, assets, tmp_path):
    folder = tmp_path / "llava-okvqa" / "mdgd"
    shutil.copytree(whole, folder)
    if file == "trained.safetensors":
        (folder / "evaluation" / "okvqa.json").unlink()
    for text in ("{", "[]"):
        (folder / file).write_text(text)
        with pytest.raises(FileError, match=rf"mdgd/{file} is not {kind}.* \(.*\): remove it and call again"):
            row(assets, tmp_path, "mdgd")


def test_a_task_that_is_missing_from_a_finished_row_is_measured_again(whole, assets, tmp_path):
    folder = tmp_path / "llava-okvqa" / "mdgd"
    shutil.copytree(whole, folder)
    (folder / "evaluation" / "okvqa.json").unlink()
    row(assets, tmp_path, "mdgd")
    assert contents(folder) == contents(whole)


def test_a_disk_without_room_is_seen_before_anything_is_trained(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=20e9))
    experiment = assets.experiment("llava-okvqa", [*SHORT, "layers=6"])
    # Two checkpoints of 12 bytes a trained number, and the result.
    with pytest.raises(ConfigError, match=r"fine-tune writes about 32\.1 GB while it trains, and 20\.0 GB are free"):
        run_row(experiment, "fine-tune", tmp_path, device=CPU)
    assert not (tmp_path / "llava-okvqa" / "fine-tune" / "training.jsonl").exists()


def test_room_for_all_rows_is_seen_before_the_first(assets, tmp_path, monkeypatch):
    """Each by itself would find room, and the disk would be full in the middle of a later one."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    experiments = {"here": load_experiment("llava-okvqa")}
    rows = {"here": ["zero-shot", "fine-tune", "lora", "mdgd"]}
    # Two bytes a number that stays, and two checkpoints of 12 bytes a number, or 16 with φ.
    trained, adapters = 1_235_279_872, 29_368_320
    free = 2 * (2 * trained + adapters) + 2 * 16 * trained - 1e8
    with pytest.raises(ConfigError, match=r"these rows write about 44\.5 GB, checkpoints of 1 at a time .*, and 44\.4"):
        require_room_for_rows(experiments, rows, tmp_path, 1)
    free += 2e8
    require_room_for_rows(experiments, rows, tmp_path, 1)
    free += 2 * 12 * trained
    require_room_for_rows(experiments, rows, tmp_path, 2)
    free -= 3e8
    with pytest.raises(ConfigError, match="checkpoints of 2 at a time"):
        require_room_for_rows(experiments, rows, tmp_path, 2)
    # What is trained needs none.
    (tmp_path / "llava-okvqa" / "mdgd").mkdir(parents=True)
    (tmp_path / "llava-okvqa" / "mdgd" / NAME).touch()
    free = 2 * (trained + adapters) + 2 * 12 * trained + 1e8
    require_room_for_rows(experiments, rows, tmp_path, 1)


def test_more_layers_than_a_folder_of_weights_has_are_named(assets):
    work = Workshop(assets.experiment("llava-okvqa", ["layers=9"]), CPU)
    with pytest.raises(ConfigError, match=r"layers must be at most the 3 of \S*/llava-1\.5-7b, got 9"):
        _ = work.network


def test_a_cache_without_room_is_seen_before_anything_is_fetched(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    experiments = {"llava": load_experiment("llava-okvqa", ['pretrained=["pope"]'])}
    # 7.06e9 numbers of two bytes; the files of both data sets and the copies of them, one of another size.
    weights, teaching, measuring = 14.13e9, 2 * 1.6e9, 2 * 0.83e9 + 0.26e9 + 1.5e9
    free = weights + teaching + measuring - 0.1e9
    with pytest.raises(ConfigError, match=r"hub: about 20\.7 GB are to be fetched \(llava-hf/.* 14\.1, .* HF_HOME"):
        require_room_to_fetch(experiments, {"llava": ["fine-tune"]})
    free = weights + teaching + measuring + 0.1e9
    require_room_to_fetch(experiments, {"llava": ["fine-tune"]})
    # A row that trains nothing needs what is measured alone.
    free = weights + measuring + 0.1e9
    require_room_to_fetch(experiments, {"llava": ["zero-shot"]})
    # What is there already, or comes from folders, needs none.
    free = 0
    given = replace(experiments["llava"], source="somewhere")
    given = replace(given, data=replace(given.data, source=str(assets.data)))
    require_room_to_fetch({"llava": given}, {"llava": ["fine-tune"]})
    blob = tmp_path / "hub" / "models--llava-hf--llava-1.5-7b-hf" / "blobs" / "0"
    blob.parent.mkdir(parents=True)
    with blob.open("wb") as file:
        # Of no bytes on disk: a hole.
        file.truncate(int(14.2e9))
    require_room_to_fetch({"llava": replace(given, source="")}, {"llava": ["fine-tune"]})


def test_a_split_that_the_folder_lacks_comes_from_the_hub(assets, tmp_path, monkeypatch):
    (tmp_path / "okvqa").symlink_to(assets.data / "okvqa")
    experiment = assets.experiment("llava-okvqa", [*EXACT, "evaluation.examples=2"])
    asked = []

    def fetch(self, split, organisation, revision=None):
        asked.append((self.name, split))
        return assets.data / self.name

    monkeypatch.setattr("reproductions.paper.data.dataset.DataSet.fetch", fetch)
    work = Workshop(replace(experiment, data=replace(experiment.data, source=str(tmp_path))), CPU)
    assert len(work.training_examples()) > 2
    assert len(work.evaluation_examples("pope")) == 2
    assert asked == [("pope", "test")]


def test_workers_prepare_the_same_questions(whole, assets, tmp_path):
    """What they look at does not change what is answered: a run may be taken up with others."""
    folder = row(assets, tmp_path, "mdgd", "training.workers=2", "evaluation.batch=2")
    for path in (whole / "evaluation").glob("*.jsonl"):
        assert (folder / "evaluation" / path.name).read_text() == path.read_text()
    # Not refused, although it is set otherwise.
    row(assets, tmp_path, "mdgd", "training.workers=0", "evaluation.batch=1", "training.log_every=7")


def test_minicpm_4_6_stands_in(assets, tmp_path):
    for method in ("mdgd", "lora", "model-tailor"):
        more = ("model=minicpm-v-4.6", "training.steps=1", "evaluation.examples=1")
        folder = row(assets, tmp_path, method, *more, name="minicpm-pathvqa")
        assert json.loads((folder / "status.json").read_text())["stage"] == "done"
        assert folder.parent.name == "minicpm-pathvqa-minicpm-v-4.6", "not beside what was published for another model"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val2014"])
def test_a_broken_picture_is_named_in_a_line_whoever_reads_it(split, workers, assets, tmp_path, monkeypatch):
    def image(example):
        raise DataError("OK-VQA, split x, row 1: a broken picture")

    monkeypatch.setattr(Example, "image", property(image))
    method = "fine-tune" if split == "train" else "zero-shot"
    with pytest.raises(DataError) as caught:
        row(assets, tmp_path, method, f"training.workers={workers}")
    assert str(caught.value) == "OK-VQA, split x, row 1: a broken picture"


def test_features_of_the_target_alone_are_of_more_examples_than_the_rank(assets, tmp_path):
    folder = row(assets, tmp_path, "zero-shot", "evaluation.rank_examples=1", "evaluation.feature_examples=2",
                 "evaluation.batch=1")  # fmt: skip
    counts = {path.stem: len(load_file(path)["visual"]) for path in (folder / "features").iterdir()}
    assert counts == {"textvqa": 1, "okvqa": 2}


def test_features_are_there_whole_or_not_at_all(assets, tmp_path, monkeypatch):
    def cut_short(tensors, path):
        path.write_bytes(b"half of ")
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "save_file", cut_short)
    with pytest.raises(KeyboardInterrupt):
        row(assets, tmp_path, "zero-shot")
    assert not list(tmp_path.rglob("features/*.safetensors"))


def test_answers_with_strange_ends_of_lines(tmp_path):
    answers = ["one\u2028two", "three\x85four", "five"]
    path = tmp_path / "gqa.predictions.jsonl"
    path.write_text("".join(json.dumps({"prediction": x}, ensure_ascii=False) + "\n" for x in answers) + '{"pred')
    assert [line["prediction"] for line in read_until_cut(path)] == answers
    found = Result(tmp_path)
    (tmp_path / "evaluation").mkdir()
    path.rename(tmp_path / "evaluation" / path.name)
    assert [line["prediction"] for line in found.predictions("gqa")] == answers


def test_the_masked_cosine_is_that_of_what_is_left_of_both_gradients():
    generator = torch.Generator().manual_seed(0)
    g, v, g0, v0 = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    a = (g - (g * v).sum() / (v * v).sum() * v)[mask]
    b = (g0 - (g0 * v0).sum() / (v0 * v0).sum() * v0)[mask]
    found = masking.masked_cosine([[g], [v], [g0], [v0]], [mask])
    assert found == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))
    assert masking.masked_cosine([[g], [None], [g], [torch.zeros_like(v)]], [mask]) == pytest.approx(1)
    assert masking.masked_cosine([[g], [v], [g0], [v0]], [torch.zeros_like(mask)]) == 0


def test_changes_are_the_numbers_that_differ(assets, tmp_path):
    work = Workshop(assets.experiment("llava-okvqa", EXACT), CPU)
    published = work.pretrained
    with torch.no_grad():
        work.network.lm_head.weight[3, :2] += 1
    changed, count = changes(work.network, published)
    assert (list(changed), count) == (["lm_head.weight"], 2)
    save_changes(changed, tmp_path / NAME)
    other = Workshop(assets.experiment("llava-okvqa", EXACT), CPU).network
    load_changes(other, tmp_path / NAME)
    assert_same_bits(list(other.parameters()), list(work.network.parameters()))
    with pytest.raises(ValueError, match=r"lm_head.weight is no parameter"):
        load_changes(torch.nn.Linear(2, 2), tmp_path / NAME)


def test_rank_and_features_are_those_of_the_last_hidden_states(assets, tmp_path):
    from torch_mdgd import effective_rank

    work = Workshop(assets.experiment("llava-okvqa", EXACT), CPU)
    examples = work.evaluation_examples("textvqa")
    rank = evaluate.look(work, examples, tmp_path / "features.safetensors", len(examples))
    hidden, rows = [], []
    for example in examples:
        batch = work.model.collate([example], answers=False)
        with torch.no_grad():
            h = work.network(**batch, output_hidden_states=True).hidden_states[-1][0]
        seen = batch["input_ids"][0] == work.network.config.image_token_id
        hidden.append(h[seen])
        rows.append((h[seen][-1], h[-1]))
    assert rank == pytest.approx(effective_rank(torch.cat(hidden)), rel=1e-4)
    saved = load_file(tmp_path / "features.safetensors")
    for i, name in enumerate(("visual", "multimodal")):
        torch.testing.assert_close(saved[name], torch.stack([r[i] for r in rows]), rtol=1e-4, atol=1e-4)

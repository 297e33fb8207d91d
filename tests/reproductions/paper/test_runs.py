"""Rows of the tables from end to end on tiny models: what is trained, killed, taken up and written down."""

import json
import multiprocessing
import os
import signal
from collections import Counter

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from reproductions.methods.replay import Replay
from reproductions.paper import evaluate, masking, train
from reproductions.paper.config import ConfigError
from reproductions.paper.data import DATASETS
from reproductions.paper.methods.base import train_last
from reproductions.paper.methods.replay import Mixed
from reproductions.paper.models.base import VisionLanguageModel
from reproductions.paper.run import run_row
from reproductions.paper.weights import NAME, load_changes
from reproductions.paper.work import Workshop
from tests.properties import assert_same_bits

CPU = torch.device("cpu")
SHORT = ('pretrained=["textvqa"]', "masking.ratios=[0.5]", "training.steps=3")


class Killed(BaseException):
    """As a kill is: nothing that catches errors sees it."""


class KillAt(TrainerCallback):
    def __init__(self, step, how):
        self.step, self.how = step, how

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.how()


def die():
    raise Killed


def row(assets, results, method, *more, name="llava-okvqa", callbacks=()):
    experiment = assets.experiment(name, [*SHORT, *more])
    return run_row(
        experiment, method, results, smoke=True, device=CPU, callbacks=callbacks, console=Console(quiet=True)
    )


def contents(folder):
    """All that a row leaves, but for times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = {key: x.tolist() for key, x in load_file(path).items()}
        elif path.suffix in (".json", ".jsonl") and name not in ("status.json", "config.json"):
            found[name] = path.read_text()
    return found


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


# Kills


@pytest.mark.parametrize("method", ["fine-tune", "mdgd", "lora", "ewc", "corda", "osf"])
def test_a_run_killed_while_training_ends_as_if_it_was_not(method, assets, tmp_path):
    expected = contents(row(assets, tmp_path / "whole", method))
    with pytest.raises(Killed):
        row(assets, tmp_path / "killed", method, callbacks=[KillAt(2, die)])
    folder = tmp_path / "killed" / "llava-okvqa" / method
    assert json.loads((folder / "status.json").read_text())["stage"] == "training"
    # The log has lines of steps that are taken again, and of none that come later.
    with (folder / "training.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.0}\n{"st')
    row(assets, tmp_path / "killed", method)
    assert contents(folder) == expected


def test_minicpm_killed_while_training_ends_as_if_it_was_not(assets, tmp_path):
    expected = contents(row(assets, tmp_path / "whole", "mdgd-gm", name="minicpm-pathvqa"))
    with pytest.raises(Killed):
        row(assets, tmp_path / "killed", "mdgd-gm", name="minicpm-pathvqa", callbacks=[KillAt(1, die)])
    assert contents(row(assets, tmp_path / "killed", "mdgd-gm", name="minicpm-pathvqa")) == expected


def test_a_process_that_is_really_killed(assets, whole, tmp_path):
    callback = KillAt(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
    process = multiprocessing.get_context("fork").Process(
        target=row, args=(assets, tmp_path, "mdgd"), kwargs={"callbacks": [callback]}
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = tmp_path / "llava-okvqa" / "mdgd"
    assert not (folder / NAME).exists()
    assert list((folder / "checkpoints").iterdir())
    row(assets, tmp_path, "mdgd")
    assert contents(folder) == contents(whole)


def test_a_checkpoint_cut_short_is_passed_over(assets, whole, tmp_path):
    with pytest.raises(Killed):
        row(assets, tmp_path, "mdgd", callbacks=[KillAt(2, die)])
    checkpoints = tmp_path / "llava-okvqa" / "mdgd" / "checkpoints"
    last = checkpoints / "checkpoint-2"
    cut = checkpoints / "checkpoint-3"
    cut.mkdir()
    (cut / train.TRAINED).write_bytes((last / train.TRAINED).read_bytes()[:50])
    assert train.last_checkpoint(checkpoints) == str(last)
    assert not cut.exists()
    row(assets, tmp_path, "mdgd")
    assert contents(tmp_path / "llava-okvqa" / "mdgd") == contents(whole)


def test_a_checkpoint_holds_what_is_trained_alone(assets, tmp_path):
    with pytest.raises(Killed):
        row(assets, tmp_path, "fine-tune", callbacks=[KillAt(1, die)])
    folder = tmp_path / "llava-okvqa" / "fine-tune" / "checkpoints" / "checkpoint-1"
    work = Workshop(assets.experiment("llava-okvqa"), CPU)
    parameters = train_last(work.network, 2)
    saved = load_file(folder / train.TRAINED)
    assert sum(x.numel() for x in saved.values()) == sum(p.numel() for p in parameters)
    assert not list(folder.glob("model*"))


def test_an_evaluation_that_was_killed_asks_what_is_left(assets, whole, tmp_path, monkeypatch):
    asked, generate = Counter(), VisionLanguageModel.generate

    def generate_until(limit):
        def answer(self, batch, longest):
            asked["batches"] += 1
            if asked["batches"] > limit:
                raise Killed
            return generate(self, batch, longest)

        return answer

    expected = contents(row(assets, tmp_path / "whole", "mdgd", "evaluation.batch=1"))
    monkeypatch.setattr(VisionLanguageModel, "generate", generate_until(2))
    with pytest.raises(Killed):
        row(assets, tmp_path / "killed", "mdgd", "evaluation.batch=1")
    folder = tmp_path / "killed" / "llava-okvqa" / "mdgd"
    assert json.loads((folder / "status.json").read_text())["stage"] == "evaluation"
    lines = folder / "evaluation" / "textvqa.predictions.jsonl"
    assert len(lines.read_text().splitlines()) == 2
    lines.write_text(lines.read_text()[:-9])
    asked.clear()
    monkeypatch.setattr(VisionLanguageModel, "generate", generate_until(100))
    row(assets, tmp_path / "killed", "mdgd", "evaluation.batch=1")
    assert asked["batches"] == 2 * 3 - 1, "the first answer was there whole"
    assert contents(folder) == expected


def test_answers_to_other_examples_are_refused(assets, tmp_path):
    folder = tmp_path / "llava-okvqa" / "zero-shot" / "evaluation"
    folder.mkdir(parents=True)
    (folder / "textvqa.predictions.jsonl").write_text('{"id": "another", "prediction": "x"}\n')
    with pytest.raises(ValueError, match=r"textvqa.predictions.jsonl holds answers to other examples \(another, not"):
        row(assets, tmp_path, "zero-shot")


def test_an_analysis_that_was_killed_keeps_the_ratios_that_are_there(assets, tmp_path, monkeypatch):
    ratios = "masking.ratios=[0.3, 0.9]"
    expected = contents(row(assets, tmp_path / "whole", "mdgd-gm", ratios))
    measure, done = masking.measure, []

    def measure_once(work, trained):
        if done:
            raise Killed
        done.append(trained)
        return measure(work, trained)

    monkeypatch.setattr(masking, "measure", measure_once)
    with pytest.raises(Killed):
        row(assets, tmp_path / "killed", "mdgd-gm", ratios)
    folder = tmp_path / "killed" / "llava-okvqa" / "mdgd-gm"
    assert [entry["ratio"] for entry in json.loads((folder / "analysis" / "masking.json").read_text())] == [0.3]
    monkeypatch.setattr(masking, "measure", lambda work, trained: done.append(trained) or measure(work, trained))
    row(assets, tmp_path / "killed", "mdgd-gm", ratios)
    assert len(done) == 2
    assert contents(folder) == expected


# Methods


def changed_names(folder):
    return set(load_file(folder / NAME))


@pytest.mark.parametrize(
    ("name", "method"),
    [("llava-okvqa", "fine-tune"), ("minicpm-pathvqa", "fine-tune"), ("minicpm-pathvqa", "mdgd-no-align")],
)
def test_what_changes_is_what_the_paper_trains(method, name, assets, tmp_path):
    folder = row(assets, tmp_path, method, name=name)
    work = Workshop(assets.experiment(name), CPU)
    trained = {id(p) for p in train_last(work.network, 2)}
    expected = {name for name, p in work.network.named_parameters() if id(p) in trained}
    assert changed_names(folder) == expected
    assert not any("pos_embed" in name for name in expected), "the resampler's positions stay"


def test_lora_changes_queries_keys_and_the_connector_alone(assets, tmp_path):
    for name in ("llava-okvqa", "minicpm-pathvqa"):
        names = changed_names(row(assets, tmp_path, "lora", name=name))
        kinds = {"connector" if "projector" in n or "resampler" in n else n.split(".")[-2] for n in names}
        assert kinds == {"q_proj", "k_proj", "connector"}
        assert not any("vision" in n or "vpm" in n for n in names)
        layers = {n.split(".layers.")[1].split(".")[0] for n in names if ".layers." in n}
        assert layers == {"0", "1", "2"}, "all layers, not the last ones"


def test_mdgd_gm_changes_its_share_of_the_numbers(assets, tmp_path):
    folder = row(assets, tmp_path, "mdgd-gm", "methods.mdgd-gm.ratio=0.05")
    work = Workshop(assets.experiment("llava-okvqa"), CPU)
    total = sum(p.numel() for p in train_last(work.network, 2))
    published = work.pretrained
    load_changes(work.network, folder / NAME)
    moved = sum(int((p != published[name]).sum()) for name, p in work.network.named_parameters())
    assert 0.8 * round(0.05 * total) <= moved <= round(0.05 * total)
    lines = [json.loads(line) for line in (folder / "training.jsonl").open()]
    assert lines[-1]["kept_fraction"] == pytest.approx(0.05, rel=0.01)
    (entry,) = json.loads((folder / "analysis" / "masking.json").read_text())
    assert entry["ratio"] == 0.5
    assert -1 <= entry["cos"] <= 1
    assert entry["visual_loss"] > 0
    assert not list((folder / "analysis").glob("ratio-*"))


def test_model_tailor_begins_with_the_fine_tune_and_trains_it_if_need_be(assets, tmp_path):
    folder = row(assets, tmp_path, "model-tailor")
    fine = tmp_path / "llava-okvqa" / "fine-tune"
    assert json.loads((fine / "status.json").read_text())["stage"] == "training"
    before = (fine / NAME).read_bytes()
    row(assets, tmp_path, "fine-tune")
    assert (fine / NAME).read_bytes() == before, "trained once"
    published = Workshop(assets.experiment("llava-okvqa"), CPU).pretrained
    tuned, tailored = load_file(fine / NAME), load_file(folder / NAME)
    assert not any("projector.linear" in name for name in tailored), "the connector's Linears go back"
    for name in tuned:
        if "_proj.weight" in name and "language" in name:
            moved = (tailored[name] != published[name]).double().mean()
            assert moved < 0.5 < (tuned[name] != published[name]).double().mean()


def test_replay_puts_old_examples_among_the_new_ones():
    new, old = [f"new {i}" for i in range(10)], [f"old {i}" for i in range(6)]
    mixed = Mixed(new, Replay(old, 0.5), 4, seed=0)
    assert len(mixed) == 10
    found = [mixed[i] for i in range(10)]
    assert [x.startswith("old") for x in found] == [False, False, True, True] * 2 + [False, True]
    assert [x for x in found if x in new] == [new[i] for i in (0, 1, 4, 5, 8)]
    assert [Mixed(new, Replay(old, 0.5), 4, seed=0)[i] for i in range(10)] == found


def test_memory_is_never_what_is_measured(assets):
    work = Workshop(assets.experiment("minicpm-pathvqa"), CPU)
    measured = {(x.id, x.question) for task in work.experiment.tasks for x in work.evaluation_examples(task)}
    memory = list(work.memory())
    assert len(memory) > 6
    assert not measured & {(x.id, x.question) for x in memory}


def test_a_penalty_counts_once_a_step(assets, tmp_path):
    """With two passes a step, as with one pass over the same examples."""
    found = []
    for settings in (("training.batch=2", "training.accumulation=1"), ("training.batch=1", "training.accumulation=2")):
        folder = row(assets, tmp_path / settings[0], "l2-sp", "methods.l2-sp.weight=50.0", *settings)
        found.append(load_file(folder / NAME))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-4)


def test_a_heavy_pull_keeps_the_model_nearer(assets, tmp_path):
    published = Workshop(assets.experiment("llava-okvqa"), CPU).pretrained
    distance = {}
    for weight in (0.0, 1e3):
        folder = row(assets, tmp_path / str(weight), "l2-sp", f"methods.l2-sp.weight={weight}", "training.steps=6")
        tuned = load_file(folder / NAME)
        distance[weight] = sum(float((x - published[name]).square().sum()) for name, x in tuned.items())
    assert distance[1e3] < 0.8 * distance[0.0]


def test_fine_tuning_with_no_visual_terms_is_plain_fine_tuning(assets, tmp_path):
    plain = load_file(row(assets, tmp_path, "fine-tune") / NAME)
    off = load_file(row(assets, tmp_path, "fine-tune-lv", "methods.fine-tune-lv.align=0.0") / NAME)
    assert set(plain) == set(off)
    assert_same_bits(list(plain.values()), [off[name] for name in plain])


def test_bfloat16_weights_with_recomputed_activations(assets, tmp_path):
    for method in ("fine-tune", "model-tailor", "lora", "mdgd", "ewc", "corda", "osf"):
        folder = row(
            assets, tmp_path, method, "dtype=bfloat16", "training.checkpointing=true", "training.steps=1",
            "evaluation.examples=1", name="minicpm-pathvqa",
        )  # fmt: skip
        assert {x.dtype for x in load_file(folder / NAME).values()} == {torch.bfloat16}


def test_minicpm_4_6_stands_in(assets, tmp_path):
    for method in ("mdgd", "lora", "model-tailor"):
        folder = row(assets, tmp_path, method, "model=minicpm-v-4.6", "training.steps=1", name="minicpm-pathvqa")
        assert json.loads((folder / "status.json").read_text())["stage"] == "done"


# Measures


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
    from reproductions.paper.weights import save_changes

    work = Workshop(assets.experiment("llava-okvqa"), CPU)
    published = work.pretrained
    with torch.no_grad():
        work.network.lm_head.weight[3, :2] += 1
    assert save_changes(work.network, published, tmp_path / NAME) == 2
    other = Workshop(assets.experiment("llava-okvqa"), CPU).network
    load_changes(other, tmp_path / NAME)
    assert_same_bits(list(other.parameters()), list(work.network.parameters()))
    with pytest.raises(ValueError, match=r"lm_head.weight is no parameter"):
        load_changes(torch.nn.Linear(2, 2), tmp_path / NAME)


def test_rank_and_features_are_those_of_the_last_hidden_states(assets, tmp_path):
    from torch_mdgd import effective_rank

    work = Workshop(assets.experiment("llava-okvqa"), CPU)
    examples = work.evaluation_examples("textvqa")
    rank = evaluate.look(work, examples, tmp_path / "features.safetensors")
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

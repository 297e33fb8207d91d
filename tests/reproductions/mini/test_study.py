"""The study: its systems train what they say, its settings are chosen by its rules, and it resumes."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from reproductions.methods.kl import answer_logits
from reproductions.mini.commands import STUDY
from reproductions.mini.experiment import calibration, costs, own_answers, remembered, study
from reproductions.mini.experiment.adapters import PullOfAdapters, adapt_all
from reproductions.mini.experiment.calibration import prompts
from reproductions.mini.experiment.cells import CELLS, Cell
from reproductions.mini.experiment.finetune import finetune, prepare, replayed, trainable_parameters, training
from reproductions.mini.experiment.losses import Additions
from reproductions.mini.experiment.measure import divergence, pretrained_answers
from reproductions.mini.experiment.methods import METHODS, Method, rule_of
from reproductions.mini.experiment.outcomes import CellOutcomes, Outcome, load
from reproductions.mini.experiment.parallel import execute_all
from reproductions.mini.experiment.run import Run, execute, rounded
from reproductions.mini.experiment.scores import average, h_scores, kept, mean, rate_that_reaches, target_score
from reproductions.mini.experiment.systems import CANDIDATES, SYSTEMS
from reproductions.mini.model.checkpoint import CHECKPOINT, load_checkpoint
from reproductions.mini.model.evaluate import Evaluation, evaluate
from reproductions.mini.report.tables import score_table
from reproductions.mini.rules import History
from reproductions.mini.world.data import TaskData, pixel_values, target_data, training_batch
from reproductions.mini.world.questions import CAPTION_QUESTION, PRETRAINED_TASKS
from reproductions.shared.results import read_results
from torch_mdgd import StepProject

CELL = CELLS[0]
SIZE = study.Size(steps=2, batch=4, tuning_examples=2, examples=2)


@pytest.fixture(autouse=True)
def one_checkpoint(monkeypatch):
    monkeypatch.setattr(study, "checkpoint_of", lambda seed, architecture: CHECKPOINT)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "zero-shot"])
def test_every_system_moves_what_it_says(name, monkeypatch):
    monkeypatch.setattr(own_answers, "BATCHES", 1)
    monkeypatch.setattr(own_answers, "SIZE", 8)
    monkeypatch.setattr(f"{finetune.__module__}.prompts", partial(prompts, batches=2, size=8))
    monkeypatch.setattr(f"{Method.__module__}.PROMPTS", 3)
    monkeypatch.setattr(remembered, "SAMPLES", 5)
    model, tokenizer = load_checkpoint()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = SYSTEMS[name].candidates("adamw", 1.0)[-1]
    course = finetune(model, tokenizer, target_data("digits", "train"), method, seed=0, steps=2, batch_size=4)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    moved = {n: int((before[n] != after[n]).sum()) for n in before}
    parts = {n.split(".")[1] for n, count in moved.items() if count}
    if method.adapters != "paper":
        adapted = {n.split(".")[-2] for n, count in moved.items() if count}
        assert adapted == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")} | {"linear_1", "linear_2"}
        assert not any("vision_tower" in n for n, count in moved.items() if count)
    elif method.lora:
        assert {n.split(".")[-2] for n, count in moved.items() if count} == {"q_proj", "k_proj", "linear_1", "linear_2"}
    elif method.tailor is not None:
        kept = {"multi_modal_projector"} if method.connector == "keep" else set()
        assert parts == {"language_model"} | kept, "the projector goes back, or stays"
        inside = {n: count for n, count in moved.items() if "language_model" in n}
        assert sum(inside.values()) < 0.2 * course.trained
    elif method.trained != "last":
        wanted = {"attention": {"q_proj", "k_proj", "v_proj", "o_proj"}, "gate-up": {"gate_proj", "up_proj"}}
        assert {n.split(".")[-2] for n, count in moved.items() if count} == wanted[method.trained]
    elif method.momentum < 1 or method.drop is not None:
        # The numbers with the largest momentum of either step, and vectors.
        share = 2 * method.momentum if method.drop is None else 1 - method.drop
        assert parts == {"language_model", "multi_modal_projector"}
        assert 0.4 * share * course.trained < sum(moved.values()) < 1.1 * share * course.trained
    elif method.spider or method.kept is not None:
        # SPIDER leaves what was more important before; of OSF fewer numbers are trained than move.
        assert parts == {"language_model", "multi_modal_projector"}
        assert 0.2 * course.trained < sum(moved.values()) <= 459_520
    else:
        assert parts == {"language_model", "multi_modal_projector"}
        assert 0.9 * course.trained <= sum(moved.values()) <= course.trained
        assert course.trained == round(method.fraction * 459_520)
    assert len(course.losses) == 2


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("mdgd", "MDGD(align=10, regularize=1)"),
        ("align", "MDGD(align=10, regularize=0)"),
        ("project", "Project(align=10)"),
        ("step", "StepProject(restore=0)"),
        ("restore", "History(restore=0.05)"),
        ("budget", "DriftBudget(Project(align=1), 0.1)"),
        ("reference", "Reference(align=10)"),
        ("global", "Global(align=10, regularize=1)"),
        ("lazy", "MDGD(align=10, regularize=0)"),
    ],
)
def test_the_rule_that_settings_tell(name, rule):
    assert repr(rule_of(SYSTEMS[name].method.wrap, nn.Module())) == rule


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("anchor", "Anchor(3, rank=8)"),
        ("anchor-running", "Anchor(3, rank=8)"),
        ("anchor-lazy", "Anchor(1, rank=8, rule=MDGD(align=3, regularize=0))"),
        ("lora-anchor", "Anchor(3, rank=8)"),
        ("anchor-image", "Anchor(3, rank=8)"),
        ("anchor-all", "Anchor(3, rank=8)"),
        ("anchor-2", "Anchor(3, rank=2)"),
        ("anchor-whole", "Anchor(3, rank=None)"),
    ],
)
def test_the_anchor_that_settings_tell(name, rule):
    method = SYSTEMS[name].candidates("adamw", 1.0)[0]
    model, tokenizer = load_checkpoint()
    model, parameters = prepare(model, method)
    data = target_data("digits", "train", 40)
    drawn = []

    def draw():
        drawn.extend(prompts(method.calibration, data, tokenizer, 0, batches=2, size=4))
        return drawn

    optimizer = method.optimizer(model, parameters, prompts=draw)
    assert repr(optimizer.rule) == rule
    assert optimizer.rule.relative
    assert len(optimizer.rule.layers) == (4 * 7 + 2 if method.lora else 2 * 7 + 2)
    running = name in ("anchor-running", "anchor-all")
    assert optimizer.rule.tokens == {"anchor-image": "image", "anchor-all": "all"}.get(name, "prompt")
    assert optimizer.rule.covariances.seen == (0 if running else optimizer.rule.warmup)
    assert bool(drawn) == (not running)
    if name == "anchor-lazy":
        assert optimizer.rule.rule.every == 8
    if name == "anchor-image":
        counted = {int(optimizer.rule.covariances.moments[layer.key].size[1]) for layer in optimizer.rule.layers}
        pictures = sum(int(b["input_ids"].eq(model.config.image_token_id).sum()) for b in drawn)
        assert counted == {pictures}, "in the decoder, and in the connector, which has a token each"


@pytest.mark.parametrize("kind", ["questions", "random"])
def test_the_model_answers_questions_about_the_tasks_pictures_itself(kind, checkpoint):
    model, tokenizer = checkpoint
    data = target_data("caption", "train", 20)
    found = own_answers.own_answers(model, tokenizer, data, kind, 3, batches=2, size=5)
    asked = calibration.questions(kind, data, tokenizer, 3, 2, 5)
    assert [example.question for example in found] == [question for _, question in asked]
    assert all(example.picture is data.examples[i].picture for example, (i, _) in zip(found, asked, strict=True))
    if kind == "questions":
        assert all(example.answer for example in found)
        again = evaluate(model, tokenizer, TaskData("any", found, ()))
        assert again.predictions == tuple(example.answer for example in found)


def test_a_share_of_replay_is_kept_over_the_steps():
    for share, steps in ((0.01, 100), (0.05, 40), (0.1, 30), (0.5, 7)):
        counts = [replayed(share, 16, step) for step in range(steps)]
        assert sum(counts) == round(share * 16 * steps)
        assert max(counts) - min(counts) <= 1
    assert {replayed(0.5, 16, step) for step in range(300)} == {8}, "as committed results were made"


def test_a_divergence_is_that_at_its_own_tokens(checkpoint):
    model, tokenizer = load_checkpoint()
    parameters = trainable_parameters(model)
    data = target_data("digits", "train")
    answered = own_answers.own_answers(model, tokenizer, data, "questions", 0, batches=1, size=6)
    batch = training_batch(data.examples[:4], tokenizer)
    methods = {where: Method("kl", "KL", 1e-3, kl=2.0, kl_at=where) for where in ("answers", "questions")}
    losses = {where: Additions(model, method, tokenizer, answered, 5) for where, method in methods.items()}
    with torch.no_grad():
        for p in parameters:
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        other = training_batch(
            [answered[i] for i in np.random.default_rng([5, 9]).choice(6, 4, replace=False)], tokenizer
        )
        for where, asked in (("answers", batch), ("questions", other)):
            output = model(**batch)
            found = float(losses[where](batch)(output)) - float(output.loss)
            p, q = (
                answer_logits(m(**asked).logits, asked["labels"]).double().softmax(-1) for m in (checkpoint[0], model)
            )
            assert found == pytest.approx(2 * float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)


def test_a_middle_layers_features_are_looked_at():
    seen = {}
    for layer in (-1, 3):
        model, tokenizer = load_checkpoint()
        method = SYSTEMS["align"].method.with_settings(features=layer)
        model, parameters = prepare(model, method)
        options = {"seed": 0, "steps": 4, "batch_size": 4}
        *_, (_, optimizer) = training(model, tokenizer, target_data("digits", "train"), method, parameters, **options)
        seen[layer] = float(optimizer.diagnostics["visual_loss"])
    assert min(seen.values()) > 0
    assert seen[3] != pytest.approx(seen[-1], rel=0.01)


def test_settings_that_a_rule_would_leave_idle_are_refused():
    with pytest.raises(ValueError, match="a rule makes the step"):
        SYSTEMS["align"].method.with_settings(kl=1.0)


def test_a_tenth_of_the_rate_that_learns_best():
    results = tuned({"fine-tune": [(99, 50), (90, 85), (60, 90), (1, 1)]})
    assert study.chosen(CELL, SYSTEMS["fine-tune-tenth"], SIZE, results).learning_rate == pytest.approx(2e-4)


def test_every_committed_result_is_found_again(monkeypatch):
    """Their keys are of settings that systems of today still tell."""
    monkeypatch.undo()
    found = set()
    for cell in load(STUDY):
        found |= {run["key"] for outcome in cell.systems.values() for run in outcome.runs.values()}
        tried = [pair for pairs in (*cell.tuning.values(), *cell.edges.values()) for pair in pairs]
        found |= {run["key"] for _, runs in tried for run in runs}
        found |= {run["key"] for _, curve in cell.frontier.values() for runs in curve.values() for run in runs}
    gone = {key for stage in ("test", "frontier") for key in read_results(STUDY / f"{stage}.jsonl") if key not in found}
    assert all(json.loads(key)["method"]["lora"] == 8 for key in gone), "LoRA's rates of before they were moved down"
    assert len(gone) == 18
    # Validation results are those of leads too, and of the rates that others were matched by.
    assert len(read_results(STUDY / "tune.jsonl").keys() & found) >= 25 * CANDIDATES * 2 * 3


def test_the_divergence_on_the_new_task_is_none_before_training_and_positive_after(checkpoint):
    model, tokenizer = checkpoint
    assert divergence(model, tokenizer, "digits", "test", 5, CHECKPOINT) == pytest.approx(0, abs=1e-9)
    other, _ = load_checkpoint()
    with torch.no_grad():
        for p in trainable_parameters(other):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    (batch,), (was,) = pretrained_answers(CHECKPOINT, "digits", "test", 5)
    p, q = was.exp(), answer_logits(other(**batch).logits, batch["labels"]).detach().double().softmax(-1)
    found = divergence(other, tokenizer, "digits", "test", 5, CHECKPOINT)
    assert found == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-6)
    assert found > 0


def test_every_8th_step_of_lazy_looks_at_the_features():
    data, looked = target_data("digits", "train"), []
    model, tokenizer = load_checkpoint()
    model, parameters = prepare(model, SYSTEMS["lazy"].method)
    options = {"seed": 0, "steps": 9, "batch_size": 2}
    for _, optimizer in training(model, tokenizer, data, SYSTEMS["lazy"].method, parameters, **options):
        looked.append("visual_loss" in optimizer.diagnostics)
    assert looked[:8] == [False] * 7 + [True]


@pytest.mark.parametrize("kind", ["random", "questions", "own"])
def test_prompts_have_the_tasks_pictures_and_no_answers(kind, tokenizer):
    data = target_data("caption", "train", 40)
    batches = prompts(kind, data, tokenizer, 3, batches=2, size=7)
    again = prompts(kind, data, tokenizer, 3, batches=2, size=7)
    assert len(batches) == 2
    own = pixel_values([example.picture for example in data.examples])
    for batch, same in zip(batches, again, strict=True):
        assert "labels" not in batch
        assert all(torch.equal(batch[name], same[name]) for name in batch)
        assert all(any(torch.equal(picture, x) for x in own) for picture in batch["pixel_values"])
        assert (batch["input_ids"] == tokenizer.get_vocab()["<a>"]).sum(1).tolist() == [1] * 7, "up to the answer"
    asked = [
        text.split("<q> ")[1].split(" <a>")[0]
        for batch in batches
        for text in tokenizer.batch_decode(batch["input_ids"])
    ]
    starts = ("what is at", "what kind", "is there", "what letter", "which is", "how many", "what colour")
    if kind == "own":
        assert set(asked) == {CAPTION_QUESTION}
    elif kind == "questions":
        assert all(question.startswith(starts) for question in asked)
        assert len({question.split()[1] for question in asked}) > 3, "of several tasks"
    else:
        assert all(3 <= len(question.split()) <= 8 for question in asked)
        assert len(set(asked)) == 14
    assert SYSTEMS["anchor-questions"].knows
    assert not SYSTEMS["anchor"].knows


def test_the_pull_of_adapters_is_that_on_what_they_add():
    model, _ = load_checkpoint()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = adapt_all(model, 3)
    pull = PullOfAdapters(adapted, 0.5)
    assert float(pull().detach()) == 0, "B is zero"
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    found = float(pull().detach())
    adapted.merge_and_unload()
    size = sum(float((p - before[name]).detach().double().square().sum()) for name, p in model.named_parameters())
    assert found == pytest.approx(0.25 * size, rel=1e-4)


def test_a_history_of_one_is_the_step_without_it():
    method = SYSTEMS["history"].method
    assert [rule_of(method.with_settings(history=k).wrap, nn.Module()).__class__ for k in (1, 4)] == [
        StepProject,
        History,
    ]
    assert rule_of(method.wrap, nn.Module()).k == 16


def test_every_system_is_tuned_as_much_and_is_told_apart():
    for system in SYSTEMS.values():
        candidates = {str(method) for method in system.candidates("sgd", 7.0)}
        assert len(candidates) == (CANDIDATES if system.grid else 1)
        assert not system.grid or all(method.base == "sgd" for method in system.candidates("sgd", 7.0))
        assert system.choose in ("H", "T", *SYSTEMS)
    assert len({system.label for system in SYSTEMS.values()}) == len(SYSTEMS)
    assert {c.name for c in CELLS} == {f"{t}-{b}" for t in ("digits", "caption") for b in ("adamw", "sgd")}


def test_beyond_an_edge_lies_the_next_value_by_ratio_and_all_else_stays():
    system = SYSTEMS["mdgd"]
    low, high = system.candidates("sgd", 50.0)[0], system.candidates("sgd", 50.0)[-1]
    assert (low.learning_rate, low.wrap["align"], high.learning_rate, high.wrap["align"]) == (0.05, 3, 0.1, 10)
    assert system.beyond(low, "sgd", 50.0) == [
        low.with_settings(learning_rate=0.025), low.with_settings(align=0.9),
    ]  # fmt: skip
    assert system.beyond(high, "sgd", 50.0) == [high.with_settings(learning_rate=0.2), high.with_settings(align=33.33)]
    inside = SYSTEMS["lora"].candidates("adamw", 1.0)[1]
    assert SYSTEMS["lora"].beyond(inside, "adamw", 1.0) == [], "neither an edge, nor another rank"
    shares = SYSTEMS["inputs"].candidates("adamw", 1.0)[0]
    assert SYSTEMS["inputs"].beyond(shares, "adamw", 1.0) == [shares.with_settings(learning_rate=5e-4)]


def test_learning_rates_of_another_cell_are_scaled_and_nothing_else_is():
    plain = SYSTEMS["mdgd"].candidates("adamw", 1.0)
    scaled = SYSTEMS["mdgd"].candidates("sgd", 50.0)
    assert [replace(m, base="adamw", learning_rate=m.learning_rate / 50) for m in scaled] == plain


def result(P, T, target="digits", **more):
    return {"target": target, "P": P, "P_restricted": P + 1, "T": T, "T_words": T + 2, **more}


def test_the_three_harmonic_means():
    scores = h_scores(result(60.0, 20.0))
    assert average(result(60.0, 20.0)) == 55.0
    assert scores["H"] == pytest.approx(2 * 60 * 20 / 80)
    assert scores["H LLaVA"] == pytest.approx(2 * 60 * 55 / 115)
    assert scores["H MiniCPM"] == pytest.approx(2 * 55 * 20 / 75)
    assert h_scores(result(60.0, 0.0))["H"] == 0


def test_captions_count_words_and_restricted_answers():
    assert (kept(result(60.0, 20.0)), target_score(result(60.0, 20.0))) == (60, 20)
    assert (kept(result(60.0, 20.0, "caption")), target_score(result(60.0, 20.0, "caption"))) == (61, 22)


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ("a fox and a bee on red", 1),
        ("a fox and a cat on red", 2 / 3),
        ("a bee and a fox on red", 1 / 3),
        ("fox bee red", 1),
        ("fox", 1 / 3),
        ("a fox and a bee on red and a cat", 3 / 4),
        ("", 0),
    ],
)
def test_the_share_of_content_words(given, share):
    assert Evaluation("caption", ("a fox and a bee on red",), (given,), None).words == pytest.approx(100 * share)


def test_answers_of_one_word_are_right_or_wrong():
    score = Evaluation("letter", ("a", "b"), ("a", "b b"), None)
    assert score.words == score.exact == 50


def test_the_lowest_rate_that_reaches_a_score():
    assert rate_that_reaches([1e-3, 1e-1], [50, 70], 60) == pytest.approx(1e-2)
    assert rate_that_reaches([1e-3, 1e-2, 1e-1], [50, 90, 70], 90) == pytest.approx(1e-2)
    assert rate_that_reaches([1e-3, 1e-2, 1e-1], [60, 40, 80], 70) == pytest.approx(10**-1.5, rel=1e-3)
    assert rate_that_reaches([1e-3, 1e-2], [50, 70], 40) == 1e-3
    assert rate_that_reaches([1e-3, 1e-2], [50, 70], 99) == 1e-2


def tuned(scores):
    """Tuning results: of each system, P and T of every candidate, the same for each seed; None where it failed."""
    found = {}
    for name, pairs in scores.items():
        system = SYSTEMS[name]
        runs = study.tuning_runs(CELL, [system], SIZE)
        assert len(runs) == 2 * len(pairs)
        for method, pair in zip(system.candidates(CELL.base, CELL.rate), pairs, strict=True):
            for run in runs:
                if run.method == method:
                    found[run.key] = {"failed": "nan"} if pair is None else result(*pair)
    return found


def test_settings_are_chosen_by_each_systems_rule():
    results = tuned({"fine-tune": [(99, 50), (90, 85), (60, 90), None], "mdgd": [(1, 1), (95, 87.5), (1, 1), (1, 1)]})
    chosen = {name: study.chosen(CELL, SYSTEMS[name], SIZE, results) for name in SYSTEMS if "fine-tune" in name}
    assert chosen["fine-tune"].learning_rate == 2e-3
    assert chosen["fine-tune-low"].learning_rate == 1e-3
    assert chosen["fine-tune-matched"].learning_rate == pytest.approx(1e-3 * 2**0.5, rel=1e-3)
    assert study.chosen(CELL, SYSTEMS["mdgd"], SIZE, results).wrap["align"] == 10.0
    assert study.chosen(CELL, SYSTEMS["zero-shot"], SIZE, {}).learning_rate is None
    with pytest.raises(ValueError, match="stage 'tune'"):
        study.chosen(CELL, SYSTEMS["align"], SIZE, results)
    edges = study.edge_runs(CELL, [SYSTEMS[name] for name in ("zero-shot", "fine-tune", "mdgd")], SIZE, results)
    mdgd = study.chosen(CELL, SYSTEMS["mdgd"], SIZE, results)
    wanted = [mdgd.with_settings(learning_rate=5e-4), mdgd.with_settings(align=33.33)]
    assert [(run.method, run.seed, run.split) for run in edges] == [
        (method, seed, "validation") for seed in study.TUNING_SEEDS for method in wanted
    ], "what was chosen by H, at its edges"


def test_a_failed_candidate_counts_as_nothing():
    assert mean([result(60.0, 20.0), {"failed": "nan"}], kept) == 30


def test_seeds_of_tuning_are_refused_for_tests(tmp_path):
    with pytest.raises(ValueError, match="seed 101 is kept for choosing"):
        study.study(tmp_path, [CELL], ["step"], [0, 101], ["test"], SIZE, Console(quiet=True))
    with pytest.raises(ValueError, match="seed 100"):
        study.test_runs(CELL, [SYSTEMS["zero-shot"]], [100], SIZE, {})
    runs = study.test_runs(CELL, [SYSTEMS["zero-shot"]], range(6), SIZE, {})
    assert [(run.seed, run.split) for run in runs] == [(0, "test"), (1, "test")], "once for each checkpoint"
    assert all(run.split == "validation" for run in study.tuning_runs(CELL, [SYSTEMS["step"]], SIZE))


def test_seeds_take_turns_with_the_checkpoints(monkeypatch):
    monkeypatch.undo()
    assert [study.checkpoint_of(seed).name for seed in (0, 1, 100, 101)] == ["pretrained", "second"] * 2


def test_the_study_runs_and_resumes(tmp_path, monkeypatch):
    # One seed of each kind: which ones there are is asked where runs are listed.
    monkeypatch.setattr(study, "TUNING_SEEDS", (100,))
    monkeypatch.setattr(study, "FRONTIER_SEEDS", (0,))
    monkeypatch.setattr(costs, "WARM_UP", 1)
    monkeypatch.setattr(costs, "TIMED", 2)
    names, console = ["zero-shot", "restore"], Console(record=True, width=100)
    arguments = tmp_path, [CELL], names, [0], study.STAGES, SIZE
    study.study(*arguments, console, workers=1)
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {name: len(text.splitlines()) for name, text in files.items()} == {
        "tune.jsonl": CANDIDATES + 2, "test.jsonl": 2, "costs.jsonl": 1, "frontier.jsonl": 4,
    }  # fmt: skip
    cost = json.loads(files["costs.jsonl"])
    assert (cost["cell"], cost["system"]) == (CELL.name, "restore")
    assert cost["seconds"] > 0
    assert "restore" in console.export_text()
    zero, step = (json.loads(line) for line in sorted(files["test.jsonl"].splitlines(), key=lambda x: "wrap" in x))
    assert zero["trained"] == zero["peak_bytes"] == 0
    assert step["trained"] == 459_520
    # Weights, their moments and gradients are four times the trained bytes; the reference and the rest come on top.
    assert step["peak_bytes"] > 4 * 4 * step["trained"]
    for found in (zero, step):
        for measured in ("rank", "drift", "relative_drift"):
            assert set(found[measured]) == {*PRETRAINED_TASKS, "digits"}
    assert set(zero["drift"].values()) == {0.0}
    assert all(value > 0 for value in step["drift"].values())
    # A kill in the middle of a line.
    (tmp_path / "tune.jsonl").write_text(files["tune.jsonl"][:-50])
    study.study(*arguments, console, workers=1)
    assert read_results(tmp_path / "tune.jsonl").keys() == {
        json.loads(x)["key"] for x in files["tune.jsonl"].splitlines()
    }
    for name in ("test.jsonl", "costs.jsonl"):
        assert (tmp_path / name).read_text() == files[name], "is not done again"


def test_costs_are_measured_again_if_settings_change_and_other_cells_keep_theirs(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(costs, "step_seconds", lambda methods, *_: asked.append(methods) or dict.fromkeys(methods, 1.0))
    methods = {name: SYSTEMS[name].method for name in ("zero-shot", "fine-tune", "mdgd")}
    changed = methods | {"mdgd": methods["mdgd"].with_settings(align=0.5)}
    for cell, each in (("a", methods), ("a", methods), ("b", methods), ("a", changed)):
        costs.measure_costs(tmp_path, cell, "digits", each, 2, Console(quiet=True))
    assert [list(each) for each in asked] == 3 * [["fine-tune", "mdgd"]]
    assert costs.read_costs(tmp_path, "a") == costs.read_costs(tmp_path, "b") == {"fine-tune": 1.0, "mdgd": 1.0}
    assert len((tmp_path / "costs.jsonl").read_text().splitlines()) == 4


def test_an_unknown_system_is_named(tmp_path):
    with pytest.raises(ValueError, match="'stepp'"):
        study.study(tmp_path, [CELL], ["stepp"], [0], ["test"], SIZE, Console(quiet=True))


def test_traces_and_losses_are_every_fifth_steps():
    threads = torch.get_num_threads()
    method = SYSTEMS["mdgd"].method
    found = execute(Run(method, "digits", "test", 0, 10, 1, batch=2, record="study"))
    torch.set_num_threads(threads)
    assert len(found["losses"]) == 2
    for name in ("cos_task_visual", "cos_task_reference", "visual_loss"):
        assert len(found["traces"][name]) == 2
    assert all(len(answers) == 1 for answers in found["answers"].values())


def test_a_sequence_trains_one_target_after_the_other_and_asks_for_both(monkeypatch):
    threads, trained = torch.get_num_threads(), []

    def noted(model, tokenizer, data, *args, **options):
        trained.append((data.task, id(model)))
        return finetune(model, tokenizer, data, *args, **options)

    monkeypatch.setattr(f"{execute.__module__}.finetune", noted)
    place = Cell("caption", "adamw", 200, rate=2, first=("digits",))
    size = study.Size(steps=1, batch=2, tuning_examples=1, examples=2)
    (run,) = study.runs_of(place, [SYSTEMS["fine-tune"].method], [0], size)
    assert json.loads(run.key)["first"] == ["digits"]
    found = execute(replace(run, record="scores"))
    torch.set_num_threads(threads)
    assert [task for task, _ in trained] == ["digits", "caption"]
    assert trained[0][1] == trained[1][1], "the second begins where the first ended"
    assert found["T_first"] in (0, 50, 100)
    assert (place.name, place.title) == ("digits-caption-adamw", "digits then captions, AdamW")
    outcome = Outcome(SYSTEMS["fine-tune"], run.method, {0: {"key": run.key, **found}}, ())
    table = score_table(CellOutcomes(place, {"fine-tune": outcome}, (), {}, {}, {}, {}))
    assert table.rows[0][table.columns.index("T of the first")] == f"{found['T_first']:.1f}"
    with pytest.raises(ValueError, match="first must be one of"):
        replace(run, first=("letters",))


def test_a_run_that_diverges_is_a_result(tmp_path):
    threads = torch.get_num_threads()
    wild = Run(METHODS["fine-tune"].with_settings(learning_rate=1e30), "digits", "test", 0, 5, 1, batch=2)
    (found,) = execute_all([wild], tmp_path / "results.jsonl", Console(quiet=True), workers=1)
    torch.set_num_threads(threads)
    assert "loss is" in found["failed"]
    assert found["key"]


def test_keys_hold_what_matters_and_nothing_else():
    run = Run(METHODS["mdgd"], "digits", "test", 0)
    assert json.loads(run.key) == {
        "method": {"learning_rate": 0.002, "wrap": {"align": 10.0, "regularize": 1.0}},
        "target": "digits", "split": "test", "seed": 0,
    }  # fmt: skip
    assert replace(run, method=replace(run.method, label="other", name="other")).key == run.key
    changes = {"seed": 1, "steps": 5, "batch": 7, "record": "study", "checkpoint": CHECKPOINT.with_name("second")}
    assert len({replace(run, **{name: value}).key for name, value in changes.items()} | {run.key}) == 6


def test_rounding_keeps_five_digits():
    assert rounded({"a": [1.23456789, 3], "b": ("x", True)}) == {"a": [1.2346, 3], "b": ["x", True]}


def test_a_setting_of_a_rule_needs_one():
    with pytest.raises(ValueError, match="align"):
        METHODS["fine-tune"].with_settings(align=1.0)

"""Masks by other scores, protected layers by choice, and the command that tries them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from reproductions.mini.commands import STUDY, app
from reproductions.mini.experiment import leads, study
from reproductions.mini.experiment.finetune import trainable_parameters
from reproductions.mini.experiment.methods import GONE, Method
from reproductions.mini.experiment.scored_masks import SCORES, scored_mask, squared_gradients
from reproductions.mini.experiment.systems import CANDIDATES
from reproductions.mini.model.checkpoint import CHECKPOINT, load_checkpoint
from reproductions.mini.world.data import target_data, training_batch
from reproductions.shared.results import read_results
from torch_mdgd import VisualTap


@pytest.fixture(scope="module")
def scored():
    """A model, what is trained, two batches, and F and V of them."""
    model, tokenizer = load_checkpoint()
    examples = target_data("digits", "train").examples
    batches = [training_batch(examples[i : i + 2], tokenizer) for i in (0, 2)]
    parameters = trainable_parameters(model)
    return model, parameters, batches, squared_gradients(model, parameters, batches)


def test_the_fisher_information_is_the_mean_of_squared_task_gradients(scored):
    model, parameters, batches, (F, _) = scored
    wanted = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for total, p in zip(wanted, parameters, strict=True):
            total += p.grad.double() ** 2 / 2
    model.zero_grad()
    torch.testing.assert_close(F, wanted)


def test_visual_scores_are_squares_of_how_much_numbers_move_the_features(monkeypatch):
    W = torch.randn(3, 4, requires_grad=True)
    batches = [{"x": torch.randn(5, 4)} for _ in range(2)]

    def tap(model, batch):
        z = batch["x"] @ W.T
        return SimpleNamespace(loss=z.sum()), z

    monkeypatch.setattr(VisualTap, "for_model", lambda model: tap)
    F, V = squared_gradients(nn.Identity(), [W], batches)
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, (5, 3), generator=generator) * 2.0 - 1 for _ in batches]
    torch.testing.assert_close(V[0], sum((e.T @ b["x"]).double() ** 2 for e, b in zip(signs, batches, strict=True)) / 2)
    torch.testing.assert_close(F[0], sum(b["x"].sum(0).double() ** 2 for b in batches).expand(3, 4) / 2)


@pytest.mark.parametrize("kind", SCORES)
def test_every_score_keeps_the_exact_count(scored, kind):
    model, parameters, batches, _ = scored
    chosen = scored_mask(kind, 0.1, model, parameters, batches).masks
    assert sum(int(m.sum()) for m in chosen) == round(0.1 * sum(p.numel() for p in parameters))


def chosen_by(kind, F, V, fraction, monkeypatch):
    monkeypatch.setattr("reproductions.mini.experiment.scored_masks.squared_gradients", lambda *_: (F, V))
    return [m.int().tolist() for m in scored_mask(kind, fraction, nn.Identity(), F, ()).masks]


def test_what_each_score_prefers(monkeypatch):
    F = [torch.tensor([[9.0, 1.0], [4.0, 4.0]]), torch.tensor([3.0, 7.0])]
    V = [torch.tensor([[9.0, 0.0], [0.0, 5.0]]), torch.tensor([1.0, 3.0])]
    # ε is 3: F / (V + ε) is 0.75, 0.33, 1.33, 0.5, 0.75, 1.17.
    assert chosen_by("task", F, V, 1 / 3, monkeypatch) == [[[1, 0], [0, 0]], [0, 1]]
    assert chosen_by("ratio", F, V, 1 / 3, monkeypatch) == [[[0, 0], [1, 0]], [0, 1]]
    assert chosen_by("still", F, V, 1 / 3, monkeypatch) == [[[0, 1], [1, 0]], [0, 0]], "ties to the lowest index"
    assert chosen_by("rows", F, V, 1 / 2, monkeypatch) == [[[1, 1], [0, 0]], [0, 1]], "a row by its mean of 5"
    mixed = chosen_by("mixed", F, V, 1 / 3, monkeypatch)
    assert mixed[0][0][0] == 1, "the first by F"
    assert sum(map(sum, mixed[0])) + sum(mixed[1]) == 2


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        ("all", {"language_model", "multi_modal_projector"}),
        ("decoder", {"language_model"}),
        ("projector", {"multi_modal_projector"}),
        ("attention", {"self_attn"}),
        ("mlp", {"mlp"}),
    ],
)
def test_the_layers_that_are_protected(layers, parts):
    model, _ = load_checkpoint()
    parameters = trainable_parameters(model)
    wrap = {"update": "project", "space": "step"}
    optimizer = Method("", "", 1e-3, wrap, inputs=0.9, layers=layers).optimizer(model, parameters)
    names = {id(p): name for name, p in model.named_parameters()}
    protected = [names[id(parameters[i])] for i in optimizer.rule.names]
    trained = [names[id(p)] for p in parameters if p.dim() == 2]
    assert sorted(protected) == sorted(name for name in trained if parts & set(name.split(".")))


def test_the_leads_are_tuned_as_the_study_is_and_share_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "checkpoint_of", lambda seed, architecture: CHECKPOINT)
    monkeypatch.setattr(study, "TUNING_SEEDS", (100,))
    for group in leads.GROUPS.values():
        assert all(len(system.candidates("adamw", 1.0)) == CANDIDATES for system in group)
    masks = leads.GROUPS["Which tenth of the numbers, with αv"]
    gone = [system for system in masks if system.method.mask in GONE]
    monkeypatch.setattr(leads, "GROUPS", {"masks": (masks[1], *gone, masks[-1])})
    arguments = [
        "leads",
        "--output",
        str(tmp_path),
        "--steps",
        "2",
        "--batch",
        "2",
        "--examples",
        "2",
        "--workers",
        "1",
    ]
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    torch.set_num_threads(threads)
    assert "half by F, half at random" in result.output
    lines = (tmp_path / "tune.jsonl").read_text().splitlines()
    assert len(lines) == 2 * CANDIDATES
    told = (tmp_path / "leads.md").read_text()
    assert "### masks" in told
    assert len(gone) == len(GONE)
    assert not any(system.label in told for system in gone), "they cannot be run"
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert (tmp_path / "tune.jsonl").read_text().splitlines() == lines, "nothing is run twice"


def test_committed_results_have_every_run_also_of_masks_that_cannot_be_made_any_more(scored):
    done = read_results(STUDY / "tune.jsonl")
    systems = [system for group in leads.GROUPS.values() for system in group]
    assert {run.key for run in study.tuning_runs(leads.CELL, systems, study.Size())} <= done.keys()
    model, parameters, *_ = scored
    for kind in GONE:
        with pytest.raises(ValueError, match=f"'{kind}' are there no more"):
            Method("", "", 1e-3, {}, 0.1, kind).optimizer(model, parameters)

"""What each method changes, from end to end on tiny models."""

import json

import pytest
import torch
from safetensors.torch import load_file

from reproductions.methods import METHODS
from reproductions.methods.base import train_last
from reproductions.methods.replay import Mixed, Replay
from reproductions.paper.run.weights import NAME, load_changes
from reproductions.paper.run.work import Workshop
from tests.properties import assert_same_bits
from tests.reproductions.paper.running import CPU, EXACT, row

pytestmark = pytest.mark.usefixtures("unmeasured")


def changed_names(folder):
    return set(load_file(folder / NAME))


@pytest.mark.parametrize(
    ("name", "method"),
    [("llava-okvqa", "fine-tune"), ("minicpm-pathvqa", "fine-tune"), ("minicpm-pathvqa", "mdgd-no-align")],
)
def test_what_changes_is_what_the_paper_trains(method, name, assets, tmp_path):
    folder = row(assets, tmp_path, method, name=name)
    work = Workshop(assets.experiment(name, EXACT), CPU)
    trained = {id(p) for p in train_last(work.network, 2)}
    expected = {name for name, p in work.network.named_parameters() if id(p) in trained}
    assert changed_names(folder) == expected
    assert not any("pos_embed" in name for name in expected), "the resampler's positions stay"
    total = sum(p.numel() for p in work.network.parameters() if p.requires_grad)
    assert json.loads((folder / "trained.json").read_text())["trained_numbers"] == total


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
    work = Workshop(assets.experiment("llava-okvqa", EXACT), CPU)
    total = sum(p.numel() for p in train_last(work.network, 2))
    published = work.pretrained
    load_changes(work.network, folder / NAME)
    moved = sum(int((p != published[name]).sum()) for name, p in work.network.named_parameters())
    assert 0.8 * round(0.05 * total) <= moved <= round(0.05 * total)
    counts = json.loads((folder / "trained.json").read_text())
    assert counts == {"trained_numbers": round(0.05 * total), "changed_numbers": moved}
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
    assert not (fine / "checkpoints").exists()
    before = (fine / NAME).read_bytes()
    row(assets, tmp_path, "fine-tune")
    assert (fine / NAME).read_bytes() == before, "trained once"
    published = Workshop(assets.experiment("llava-okvqa", EXACT), CPU).pretrained
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
    work = Workshop(assets.experiment("minicpm-pathvqa", EXACT), CPU)
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


def test_the_information_of_ewc_is_one_on_average(assets):
    """Else its weight would mean less the larger the model is: 8e-8 on average for one of half a million numbers."""
    work = Workshop(assets.experiment("llava-okvqa", EXACT), CPU)
    module = METHODS["ewc"]().prepare(work)
    penalty = METHODS["ewc"]().penalty(work, module)
    total = sum(f.sum() for f in penalty.fisher) / sum(f.numel() for f in penalty.fisher)
    assert float(total) == pytest.approx(1, rel=1e-4)
    assert max(float(f.max()) for f in penalty.fisher) > 10, "and not alike for all"


@pytest.mark.parametrize("method", ["l2-sp", "ewc"])
def test_a_heavy_pull_keeps_the_model_nearer(method, assets, tmp_path):
    published = Workshop(assets.experiment("llava-okvqa", EXACT), CPU).pretrained
    distance = {}
    for weight in (0.0, 1e3):
        folder = row(assets, tmp_path / str(weight), method, f"methods.{method}.weight={weight}", "training.steps=6")
        tuned = load_file(folder / NAME)
        distance[weight] = sum(float((x - published[name]).square().sum()) for name, x in tuned.items())
    assert distance[1e3] < 0.8 * distance[0.0]


def test_fine_tuning_with_no_visual_terms_is_plain_fine_tuning(assets, tmp_path):
    plain = load_file(row(assets, tmp_path, "fine-tune") / NAME)
    off = load_file(row(assets, tmp_path, "fine-tune-lv", "methods.fine-tune-lv.align=0.0") / NAME)
    assert set(plain) == set(off)
    assert_same_bits(list(plain.values()), [off[name] for name in plain])

"""The published counts of trained numbers, from networks of the published shapes on the meta device."""

import pytest
import torch

from reproductions.methods import METHODS
from reproductions.methods.base import train_last
from reproductions.paper.config import load_experiment, method_of, methods_of
from reproductions.paper.models import skeleton
from reproductions.paper.report.published import published
from reproductions.paper.run.estimate import estimate, size_of, trained_numbers
from reproductions.paper.run.work import Workshop
from tests.reproductions.paper.running import CPU, EXACT
from torch_mdgd import MDGDOptimizer, connector, last_decoder_layers, mdgd_backward

COUNTS = {
    "llava-1.5-7b": {"fine-tune": 1_235_279_872, "lora": 29_368_320, "mdgd-gm": 123_527_987},
    "minicpm-v-2": {"fine-tune": 517_777_920, "lora": 35_265_024, "mdgd-gm": 51_777_792},
}
LIKE_FINE_TUNE = ("model-tailor", "mdgd", "mdgd-no-align", "fine-tune-lv", "project", "step", "inputs", "l2-sp", "ewc",
                  "replay", "replay-1", "replay-5", "replay-10", "fine-tune-low", "lazy", "anchor", "wise-ft",
                  "kl")  # fmt: skip
# Rank 16 on all linear layers, and the connector: 16 · 32 · (4 · 2 · 4096 + 3 · (4096 + 11008)) + 20,979,712, and
# 16 · 40 · (4 · 2 · 2304 + 3 · (2304 + 5760)) + 29,366,784.
EVERYWHERE = {"llava-1.5-7b": 60_956_672, "minicpm-v-2": 56_646_144}
# Six layers of four projections of 4096², and eight of 2304².
ATTENTION = {"llava-1.5-7b": 6 * 4 * 4096**2, "minicpm-v-2": 8 * 4 * 2304**2}


@pytest.mark.parametrize("name", ["llava-okvqa", "minicpm-pathvqa"])
def test_every_method_trains_the_published_count(name):
    experiment = load_experiment(name)
    wanted = COUNTS[experiment.model]
    for method in METHODS:
        if method == "osf":
            continue
        count = trained_numbers(experiment, method_of(experiment, method))
        expected = (
            {"zero-shot": 0, "corda": wanted["lora"], "attention": ATTENTION[experiment.model]}
            | dict.fromkeys(("lora-all", "lora-all-lv", "lora-all-anchor"), EVERYWHERE[experiment.model])
            | wanted | dict.fromkeys(LIKE_FINE_TUNE, wanted["fine-tune"])
        )
        assert count == expected[method], method
    for method, row in published()[name].rows.items():
        if row.trained is not None:
            assert trained_numbers(experiment, method_of(experiment, method)) == row.trained


@pytest.mark.parametrize(
    ("model", "layers", "layer", "connecting"),
    [("llava-1.5-7b", 6, 202_383_360, 20_979_712), ("minicpm-v-2", 8, 61_051_392, 29_366_784)],
)
def test_the_parts_have_the_published_sizes(model, layers, layer, connecting):
    network = skeleton(model)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    for part in last_decoder_layers(network, layers):
        assert sum(p.numel() for p in part.parameters()) == layer
    assert sum(p.numel() for p in connector(network).parameters() if p.requires_grad) == connecting


def test_whole_models_have_the_sizes_that_their_weights_have():
    # As the hub shows them: 7.06 and 3.43 billion.
    assert round(size_of("llava-1.5-7b").total / 1e9, 2) == 7.06
    assert round(size_of("minicpm-v-2").total / 1e9, 2) == 3.43
    llava = size_of("llava-1.5-7b")
    assert llava.language == 32 * 202_383_360 + 4096 + 32064 * 4096
    assert llava.total == llava.language + 32064 * 4096 + llava.vision + 20_979_712


def test_estimates_follow_the_passes():
    experiment = load_experiment("llava-flickr30k")
    found = {name: estimate(experiment, name) for name in methods_of(experiment.model)}
    plain = found["fine-tune"].training_hours
    assert found["zero-shot"].training_hours == found["model-tailor"].training_hours == 0
    assert 3 * plain < found["mdgd"].training_hours < 4 * plain
    assert plain < found["mdgd-gm"].training_hours < 2.1 * plain
    assert found["lora"].training_hours < plain
    # φ and two more gradients of float32.
    assert found["mdgd"].memory - found["fine-tune"].memory == 12 * 1_235_279_872
    assert all(f.memory < 80e9 for f in found.values())
    assert found["mdgd"].disk == 2 * 1_235_279_872
    # Two checkpoints, each of the weights and two moments; and φ.
    assert found["fine-tune"].checkpoints == 2 * 12 * 1_235_279_872
    assert found["mdgd"].checkpoints == 2 * 16 * 1_235_279_872


@pytest.mark.parametrize(("method", "size"), [("fine-tune", 8), ("fine-tune-lv", 12), ("mdgd", 12), ("mdgd-gm", 16)])
def test_the_bytes_of_optimizer_state_that_estimates_count_with(method, size, assets):
    """Two moments; φ; and in a mask, of everything here, where each number stands."""
    experiment = assets.experiment("llava-okvqa", [*EXACT, "methods.mdgd-gm.ratio=1.0"])
    work = Workshop(experiment, CPU)
    parameters, wrap = train_last(work.network, 2), method_of(experiment, method).wrapper(work.network)
    optimizer = torch.optim.AdamW(parameters)
    if wrap is not None:
        optimizer = MDGDOptimizer(optimizer, **wrap)
    for batch in work.target_batches(2):
        if wrap is None:
            work.network(**batch).loss.backward()
        else:
            mdgd_backward(work.network, optimizer, batch, tap=work.model.tap())
        optimizer.step()
        optimizer.zero_grad()
    state = [x for found in optimizer.state_dict()["state"].values() for x in found.values()]
    total = sum(x.numel() * x.element_size() for x in state if isinstance(x, torch.Tensor))
    assert total == pytest.approx(size * sum(p.numel() for p in parameters), rel=0.02)


def test_longer_training_takes_longer_in_proportion():
    once, twice = (estimate(load_experiment("minicpm-textcaps", [f"training.epochs={n}"]), "mdgd") for n in (1, 2))
    assert twice.training_hours == pytest.approx(2 * once.training_hours)
    short = estimate(load_experiment("minicpm-textcaps", ["training.steps=10"]), "mdgd")
    examples = 10 * 64 / 21953
    assert short.training_hours == pytest.approx(examples * once.training_hours)

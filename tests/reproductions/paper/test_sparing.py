"""What spares a card's memory: it is refused where it cannot be, and does what it says where it can."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from reproductions.paper.config import load_experiment, method_of
from reproductions.paper.models import skeleton
from reproductions.paper.run import sparing
from reproductions.paper.run.estimate import CARDS, ORDER, estimate, fitting, with_settings
from reproductions.paper.run.sparing import frozen, linear_layers, require_possible
from reproductions.paper.run.work import Workshop
from reproductions.shared.fields import ConfigError
from tests.reproductions.paper.running import CPU, EXACT, row
from torch_mdgd import connector
from torch_mdgd.storage.host import HostStorage


@pytest.mark.usefixtures("unmeasured")
def test_the_reference_on_the_cpu_changes_no_number(assets, tmp_path, monkeypatch):
    held, follow = [], HostStorage.follow
    monkeypatch.setattr(HostStorage, "follow", lambda self, ps: held.append(len(ps)) or follow(self, ps))
    settings = ("training.steps=2", "training.reference=cpu")
    found = load_file(row(assets, tmp_path / "cpu", "fine-tune-lv", *settings) / "trained.safetensors")
    assert held
    wanted = load_file(row(assets, tmp_path / "device", "fine-tune-lv", settings[0]) / "trained.safetensors")
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("mdgd-gm", ["training.optimizer=adamw8bit"], "add --set methods.mdgd-gm.compact=false"),
        ("corda", ["training.quantize=all"], "CorDA makes its adapters from the weights in full"),
        ("replay", ['pretrained=["pope"]'], "pretrained: none of pope has a training split to remember"),
        ("osf", ["training.quantize=vision"], "training.quantize=vision: OSF makes"),
        ("l2-sp", ["training.reference=cpu"], "L2-SP holds a reference of its own on the card"),
        ("mdgd", ["training.shard=true"], "training.shard splits a row over the processes of torchrun, and this is"),
        ("fine-tune", ["training.optimizer=adamw8bit"], "training.optimizer: bitsandbytes is not installed"),
        ("lora", ["training.quantize=decoder"], "training.quantize: bitsandbytes is not installed"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(method, settings, message, monkeypatch):
    monkeypatch.setattr(sparing, "find_spec", lambda name: None)
    experiment = load_experiment("llava-okvqa", settings)
    with pytest.raises(ConfigError, match=message):
        require_possible(experiment, method_of(experiment, method))
    require_possible(experiment, method_of(experiment, "zero-shot"))
    require_possible(experiment, method_of(experiment, "model-tailor"))


@pytest.mark.parametrize(
    ("method", "accumulation", "more", "message"),
    [
        ("mdgd", 3, [], "2 processes share the passes of a step, and training.accumulation is 3"),
        ("mdgd-gm", 2, ["training.shard=true"], "add --set methods.mdgd-gm.compact=false"),
        ("kl", 2, ["training.shard=true"], "its tensors are of whole weights"),
        ("mdgd", 2, ["training.shard=true", "training.reference=cpu"], "goes with no other setting"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(method, accumulation, more, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    experiment = load_experiment("llava-okvqa", [f"training.accumulation={accumulation}", *more])
    with pytest.raises(ConfigError, match=message):
        require_possible(experiment, method_of(experiment, method))


def test_four_bits_are_of_frozen_layers_without_connectors_and_head():
    network = skeleton("llava-1.5-7b")
    method_of(load_experiment("llava-okvqa"), "fine-tune").mark(network, 6)
    parts = {part: linear_layers(network, part) for part in ("vision", "decoder", "all", "none")}
    # Four projections and two layers in each of CLIP's 24; in a layer of the decoder seven, of which six train.
    assert {part: len(layers) for part, layers in parts.items()} == {
        "vision": 24 * 6, "decoder": 32 * 7, "all": 24 * 6 + 32 * 7, "none": 0,
    }  # fmt: skip
    assert len(frozen(parts["decoder"])) == (32 - 6) * 7
    assert not set(parts["all"]) & {network.lm_head, *connector(network).modules()}


def test_a_card_holds_what_the_formulas_say():
    experiment = load_experiment("llava-okvqa")
    plain = estimate(experiment, "mdgd").memory
    numbers = 1_235_279_872
    assert plain - estimate(with_settings(experiment, "r"), "mdgd").memory == 4 * numbers
    assert plain - estimate(with_settings(experiment, "8"), "mdgd").memory == pytest.approx(5.97 * numbers, rel=1e-3)
    # 26 frozen layers of the decoder, and CLIP's, at 1.48 bytes less.
    spared = plain - estimate(with_settings(experiment, "q"), "mdgd").memory
    assert spared == pytest.approx(1.484 * (26 * 202_375_168 + 24 * 12 * 1024**2), rel=1e-3)
    # Each tensor is pinned in the next power of two: 4096² · 4 is one, and 4096 · 11008 · 4 takes 2²⁸ bytes.
    host = estimate(with_settings(experiment, "r"), "mdgd").host - estimate(experiment, "mdgd").host
    layers = 6 * (4 * 4 * 4096**2 + 3 * 2**28 + 2 * 4 * 4096)
    assert host == pytest.approx(layers + 4 * (1024 * 4096 + 4096**2), rel=1e-3)


@pytest.mark.parametrize("method", ["zero-shot", "fine-tune", "fine-tune-lv", "mdgd", "mdgd-gm", "lora-all"])
def test_the_list_names_the_first_way_that_fits(method):
    experiment = load_experiment("llava-okvqa")
    fits = fitting(experiment, method)
    assert list(fits) == list(CARDS)
    for card, there in fits.items():
        room = CARDS[card].memory - 1.5e9
        before = ORDER if there is None else ORDER[: ORDER.index(there[0])]
        tried = [estimate(with_settings(experiment, letters), method).memory for letters in before]
        assert there is None or there[1].memory <= room
        assert all(memory > room for memory in tried) or method in ("mdgd-gm", "zero-shot")
    assert fits["80 GB"][0] == "", "as the tables are made"


class Watching(TrainerCallback):
    """Remembers what a model and an optimizer are made of, and may stop after a checkpoint."""

    def __init__(self, stop=0):
        self.stop = stop

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.kinds = Counter(type(part).__name__ for part in model.modules())
        inner = optimizer.optimizer
        self.optimizer = getattr(inner, "base", inner)

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["fine-tune-lv", "lora-all"])
def test_all_together_train_are_measured_in_full_and_resumed(method, assets, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = ("training.optimizer=adamw8bit", "training.quantize=all", "training.reference=cpu")
    seen = Watching()
    whole = row(assets, tmp_path / "whole", method, *settings, callbacks=[seen])
    # Seven in the one frozen layer of the decoder, or in all three under adapters; six in each of two of the tower.
    assert seen.kinds["Linear4bit"] == {"fine-tune-lv": 1, "lora-all": 3}[method] * 7 + 2 * 6
    assert seen.optimizer.args.optim_bits == 8
    trained = load_file(whole / "trained.safetensors")
    network = Workshop(assets.experiment("llava-okvqa", EXACT), CPU).network
    published = dict(network.named_parameters())
    assert trained.keys() <= published.keys()
    assert all(x.dtype == published[name].dtype and x.shape == published[name].shape for name, x in trained.items())
    plain = load_file(row(assets, tmp_path / "plain", method) / "trained.safetensors")
    assert trained.keys() == plain.keys()
    assert any(not torch.equal(trained[name], plain[name]) for name in plain), "gradients went through 4 bits"
    moves = [torch.cat([(x[name] - published[name].detach()).flatten() for name in plain]) for x in (trained, plain)]
    # Of independent directions it would be 0.02.
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.2, "near to where it goes without"
    with pytest.raises(KeyboardInterrupt):
        row(assets, tmp_path / "killed", method, *settings, callbacks=[Watching(stop=2)])
    resumed = row(assets, tmp_path / "killed", method, *settings)
    torch.testing.assert_close(load_file(resumed / "trained.safetensors"), trained)


def test_settings_that_change_results_are_part_of_a_row_and_the_others_are_not(assets, tmp_path):
    experiment = assets.experiment("llava-okvqa", EXACT)
    from reproductions.paper.report.results import Result
    from reproductions.paper.report.tables import changed_settings

    ours = replace(experiment, training=replace(experiment.training, optimizer="adamw8bit", reference="cpu"))
    found = Result(tmp_path / "llava-okvqa" / "fine-tune")
    vars(found)["config"] = {"configuration": ours.as_dict() | {"methods": {}}}
    changed = changed_settings(found)
    assert "training.optimizer" in changed
    assert "training.reference" not in changed

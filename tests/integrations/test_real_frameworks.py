"""ms-swift, LLaMA-Factory, Axolotl and Unsloth themselves, on a random Qwen2.5-VL, where they are installed.

They ask for other versions of transformers than each other and than ours, so each has an environment of its own, which
``make example-NAME`` makes; it runs the example and these tests, which begin with the example's own settings.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from safetensors.torch import load_file
from yaml import safe_dump, safe_load

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "frameworks"
OFF, ON = "MDGD(0.0, regularize=0)", "MDGD(3.0, regularize=0)"
STEPS = 4


def needs(package):
    try:
        version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed: make example-{package}")


@pytest.fixture
def folder(request, tmp_path):
    """What they train on; it asks for torchvision, which they bring along."""
    needs(request.getfixturevalue("name"))
    from examples.tiny_folder import write

    return write(tmp_path / "tiny")


def run(*command):
    # Axolotl tells its makers of every run otherwise.
    env = {**os.environ, "DO_NOT_TRACK": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def state(out):
    """What the last checkpoint holds: its adapters' or model's tensors, and its log."""
    last = sorted(out.rglob(f"checkpoint-{STEPS}"))[-1]
    tensors = {name: x for path in last.glob("*.safetensors") for name, x in load_file(path).items()}
    return tensors, json.loads((last / "trainer_state.json").read_text())["log_history"]


def settings(name, folder, out, resume):
    """The example's, with other folders."""
    text = (EXAMPLES / name / "train.yaml").read_text(encoding="utf-8").replace("runs/tiny", str(folder))
    more = {} if resume is None else {"resume_from_checkpoint": str(resume)}
    return {**safe_load(text), "output_dir": str(out), **more}


def written(folder, settings):
    (folder / "train.yaml").write_text(safe_dump(settings), encoding="utf-8")
    return folder / "train.yaml"


def swift(folder, out, rule, full, resume=None, plugin=None, **more):
    found = {**settings("ms-swift", folder, out, resume), "tuner_type": "full" if full else "lora", **more}
    if plugin is None:
        plugin = (EXAMPLES / "ms-swift" / "plugin.py").read_text(encoding="utf-8").replace(ON, str(rule))
    found["external_plugins"] = str(folder / "plugin.py")
    (folder / "plugin.py").write_text(plugin, encoding="utf-8")
    if rule is None:
        del found["external_plugins"], found["optimizer"]
    run("-m", "swift.cli.main", "sft", written(folder, found))


def llamafactory(folder, out, rule, full, resume=None):
    found = {**settings("llamafactory", folder, out, resume), "finetuning_type": "full" if full else "lora"}
    found["mdgd_rule"] = rule
    if rule is None:
        del found["mdgd_rule"]
        found["use_reentrant_gc"] = False
    door = "from llamafactory.train.tuner import run_exp; run_exp()"
    start = ["-c", door] if rule is None else ["-m", "torch_mdgd.integrations.llamafactory"]
    run(*start, written(folder, found))


def axolotl(folder, out, rule, full, resume=None):
    found = settings("axolotl", folder, out, resume)
    found["mdgd_rule"] = rule
    if full:
        found = {key: x for key, x in found.items() if key != "adapter" and not key.startswith("lora_")}
    if rule is None:
        del found["mdgd_rule"], found["plugins"]
        found["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    # Axolotl begins adapters before it sets the seed.
    seeded = "import runpy, torch; torch.manual_seed(0); runpy.run_module('axolotl.cli.train', run_name='__main__')"
    run("-c", seeded, written(folder, found))


FRAMEWORKS = {"ms-swift": swift, "llamafactory": llamafactory, "axolotl": axolotl}


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_with_nothing_to_align_it_is_the_framework_alone(name, full, folder, tmp_path):
    FRAMEWORKS[name](folder, tmp_path / "off", OFF, full)
    FRAMEWORKS[name](folder, tmp_path / "plain", None, full)
    (ours, log), (plain, plain_log) = state(tmp_path / "off"), state(tmp_path / "plain")
    assert ours.keys() == plain.keys()
    for key, x in plain.items():
        assert (ours[key] - x).abs().max() <= 1e-5 * (1 + x.abs().max()), key
    seen, plain_seen = ([entry["loss"] for entry in entries if "loss" in entry] for entries in (log, plain_log))
    assert seen == pytest.approx(plain_seen, rel=1e-4)
    assert not any("visual_loss" in entry for entry in plain_log)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_features_are_held_and_a_resumed_run_is_the_uninterrupted_one(name, full, folder, tmp_path):
    FRAMEWORKS[name](folder, tmp_path / "on", ON, full)
    whole, log = state(tmp_path / "on")
    visual = [entry["visual_loss"] for entry in log if "visual_loss" in entry]
    assert len(visual) == STEPS
    assert visual[0] == 0 < min(visual[1:])
    FRAMEWORKS[name](folder, tmp_path / "off", OFF, full)
    free = [entry["visual_loss"] for entry in state(tmp_path / "off")[1] if "visual_loss" in entry]
    assert visual[-1] < free[-1]

    middle = sorted((tmp_path / "on").rglob("checkpoint-2"))[-1]
    FRAMEWORKS[name](folder, tmp_path / "resumed", ON, full, resume=middle)
    resumed, _ = state(tmp_path / "resumed")
    for key, x in whole.items():
        assert (resumed[key] - x).abs().max() <= 1e-5 * (1 + x.abs().max()), key


PLUGIN = f"""
from torch_mdgd.integrations.swift import register, register_loss

register(rule={ON!r}, alignment="mse")
register_loss(align=3.0, alignment="mse")
"""


@pytest.mark.parametrize("name", ["ms-swift"])
def test_its_loss_type_is_its_optimizer(name, folder, tmp_path):
    """With LoRA; not with Adam, which enlarges rounding."""
    sgd = {"plugin": PLUGIN, "optim": "sgd"}
    swift(folder, tmp_path / "optimizer", ON, False, **sgd)
    swift(folder, tmp_path / "loss", ON, False, **sgd, optimizer="default", loss_type="mdgd")
    wanted, _ = state(tmp_path / "optimizer")
    found, log = state(tmp_path / "loss")
    for key, x in wanted.items():
        assert (found[key] - x).abs().max() <= 1e-5 * (1 + x.abs().max()), key
    visual = [entry["visual_loss"] for entry in log if "visual_loss" in entry]
    assert visual[0] == 0 < min(visual[1:])


# The example with Unsloth's own trainer in place of ours.
PLAIN = """
import runpy
import torch_mdgd.integrations.unsloth as door

class Plain(door.UnslothTrainer):
    def __init__(self, *, rule, tap, **options):
        super().__init__(**options)

door.MDGDUnslothTrainer = Plain
runpy.run_module("examples.frameworks.unsloth.train", run_name="__main__")
"""


def test_unsloth(tmp_path):
    """Its own fused loss and its own training step; vision models it refuses without a GPU."""
    needs("unsloth")
    run("-c", PLAIN, "--out", tmp_path / "plain")
    found = {"plain": state(tmp_path / "plain")}
    for rule in (OFF, ON):
        run("-m", "examples.frameworks.unsloth.train", "--out", tmp_path / rule, "--rule", rule)
        found[rule] = state(tmp_path / rule)
    for key, x in found["plain"][0].items():
        assert (found[OFF][0][key] - x).abs().max() <= 1e-5 * (1 + x.abs().max()), key
    held, free = ([e["visual_loss"] for e in found[rule][1] if "visual_loss" in e] for rule in (ON, OFF))
    assert held[0] == free[0] == 0
    assert held[-1] < free[-1]

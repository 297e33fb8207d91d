"""ms-swift, LLaMA-Factory, Axolotl and Unsloth themselves, on a random Qwen2.5-VL, where they are installed.

They ask for other versions of transformers than each other and than ours, so none is an extra: docs/recipes.md has the
versions with which this was run, each in an environment of its own.
"""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
OFF, ON = "MDGD(0.0, regularize=0)", "MDGD(3.0, regularize=0)"
COMMON = {
    "max_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.01, "logging_steps": 1, "save_steps": 2,
}  # fmt: skip


def needs(package):
    try:
        version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")


@pytest.fixture
def folder(request, tmp_path):
    """What they train on; it asks for torchvision, which they bring along."""
    needs(request.getfixturevalue("name"))
    from tests.tiny_folder import write

    return write(tmp_path / "tiny")


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def state(out):
    """What the last checkpoint holds: its adapters' or model's tensors, and its log."""
    last = sorted(out.rglob("checkpoint-4"))[-1]
    tensors = {name: x for path in last.glob("*.safetensors") for name, x in load_file(path).items()}
    return tensors, json.loads((last / "trainer_state.json").read_text())["log_history"]


def swift(folder, out, rule, full, resume=None):
    """The command line of docs/recipes.md, on a CPU."""
    (folder / "plugin.py").write_text(
        f"from torch_mdgd.integrations.swift import register\n\nregister(rule={rule!r})\n"
    )
    door = [] if rule is None else ["--external_plugins", folder / "plugin.py", "--optimizer", "mdgd"]
    more = [x for name, value in COMMON.items() for x in (f"--{name}", value)]
    run(
        "-m", "swift.cli.sft", "--model", folder / "model", "--model_type", "qwen2_5_vl", "--template", "qwen2_5_vl",
        "--dataset", folder / "data.jsonl", "--tuner_type", "full" if full else "lora", "--output_dir", out,
        "--per_device_train_batch_size", 2, "--use_hf", "true", "--check_model", "false", "--torch_dtype", "float32",
        "--report_to", "none", "--split_dataset_ratio", 0, "--use_cpu", "true", "--dataset_num_proc", 1,
        "--dataloader_num_workers", 0, "--load_from_cache_file", "false", "--add_version", "false", *more, *door,
        *(["--resume_from_checkpoint", resume] if resume else []),
    )  # fmt: skip


def llamafactory(folder, out, rule, full, resume=None):
    from yaml import safe_dump

    settings = {
        "model_name_or_path": str(folder / "model"), "stage": "sft", "do_train": True, "template": "qwen2_vl",
        "finetuning_type": "full" if full else "lora", "dataset": "drawn", "dataset_dir": str(folder),
        "cutoff_len": 256, "overwrite_cache": True, "output_dir": str(out), "per_device_train_batch_size": 2,
        "report_to": "none", "use_cpu": True, **COMMON, "use_reentrant_gc": False,
        **({} if resume is None else {"resume_from_checkpoint": str(resume)}),
        **({} if rule is None else {"mdgd_rule": rule}),
    }  # fmt: skip
    (folder / "train.yaml").write_text(safe_dump(settings))
    door = "from llamafactory.train.tuner import run_exp; run_exp()"
    start = ["-c", door] if rule is None else ["-m", "torch_mdgd.integrations.llamafactory"]
    run(*start, folder / "train.yaml")


def axolotl(folder, out, rule, full, resume=None):
    from yaml import safe_dump

    rows = []
    for line in (folder / "data.jsonl").read_text().splitlines():
        row = json.loads(line)
        answer = row["messages"][1]["content"]
        ask = [{"type": "image", "path": row["images"][0]}, {"type": "text", "text": "Colour?"}]
        turns = [("user", ask), ("assistant", [{"type": "text", "text": answer}])]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    (folder / "axolotl").mkdir(exist_ok=True)
    data = folder / "axolotl" / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lora = {
        "adapter": "lora", "lora_r": 4, "lora_alpha": 8,
        "lora_target_modules": r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj",
    }  # fmt: skip
    settings = {
        "base_model": str(folder / "model"), "processor_type": "AutoProcessor", "skip_prepare_dataset": True,
        "remove_unused_columns": False, "sample_packing": False, "chat_template": "tokenizer_default",
        "datasets": [{"path": str(data), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
        "sequence_len": 256, "micro_batch_size": 2, "optimizer": "adamw_torch", "lr_scheduler": "constant",
        "bf16": False, "fp16": False, "tf32": False, "gradient_checkpointing": True, "output_dir": str(out),
        "gradient_checkpointing_kwargs": {"use_reentrant": False}, "attn_implementation": "sdpa", "use_cpu": True,
        "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False, "seed": 3, **COMMON,
        **({} if full else lora), **({} if resume is None else {"resume_from_checkpoint": str(resume)}),
        **({} if rule is None else {"plugins": ["torch_mdgd.integrations.axolotl.MDGDPlugin"], "mdgd_rule": rule}),
    }  # fmt: skip
    (folder / "axolotl.yaml").write_text(safe_dump(settings))
    # Axolotl begins adapters before it sets the seed.
    seeded = "import runpy, torch; torch.manual_seed(0); runpy.run_module('axolotl.cli.train', run_name='__main__')"
    run("-c", seeded, folder / "axolotl.yaml")


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
    assert len(visual) == COMMON["max_steps"]
    assert visual[0] == 0 < min(visual[1:])
    FRAMEWORKS[name](folder, tmp_path / "off", OFF, full)
    free = [entry["visual_loss"] for entry in state(tmp_path / "off")[1] if "visual_loss" in entry]
    assert visual[-1] < free[-1]

    middle = sorted((tmp_path / "on").rglob("checkpoint-2"))[-1]
    FRAMEWORKS[name](folder, tmp_path / "resumed", ON, full, resume=middle)
    resumed, _ = state(tmp_path / "resumed")
    for key, x in whole.items():
        assert (resumed[key] - x).abs().max() <= 1e-5 * (1 + x.abs().max()), key


UNSLOTH = """
import sys
from unsloth import FastLanguageModel, UnslothTrainer
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig
from safetensors.torch import save_file
from tests.tiny_folder import tokenizer
from torch_mdgd import VisualTap
from torch_mdgd.integrations.unsloth import MDGDUnslothTrainer

out, rule = sys.argv[1:]
words = tokenizer()
torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=256, eos_token_id=258, **sizes)).save_pretrained(out)
words.save_pretrained(out)
model, words = FastLanguageModel.from_pretrained(out, load_in_4bit=False, dtype=torch.float32, local_files_only=True)
model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "v_proj", "down_proj"])
rows = Dataset.from_dict({"text": [f"ask {i}: the colour is red" for i in range(8)]})
# Unsloth takes no pictures on a CPU: a letter stands for image tokens.
tap = VisualTap(model.get_base_model().model, lambda batch: batch["input_ids"] == words.convert_tokens_to_ids("e"))
kind, more = (UnslothTrainer, {}) if rule == "None" else (MDGDUnslothTrainer, {"rule": rule, "tap": tap})
args = SFTConfig(
    output_dir=out, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.01,
    logging_steps=1, save_steps=4, report_to="none", max_length=128, use_cpu=True, bf16=False,
)
kind(model=model, processing_class=words, train_dataset=rows, args=args, **more).train()
"""


def test_unsloth(tmp_path):
    """Its own fused loss and its own training step; vision models it refuses without a GPU."""
    needs("unsloth")
    found = {}
    for rule in ("None", OFF, ON):
        run("-c", UNSLOTH, tmp_path / rule, rule)
        found[rule] = state(tmp_path / rule)
    for key, x in found["None"][0].items():
        assert (found[OFF][0][key] - x).abs().max() <= 1e-5 * (1 + x.abs().max()), key
    held, free = ([e["visual_loss"] for e in found[rule][1] if "visual_loss" in e] for rule in (ON, OFF))
    assert held[0] == free[0] == 0
    assert held[-1] < free[-1]

"""TRL's trainers with the passes of MDGD, where TRL is installed."""

import pytest
import torch

pytest.importorskip("trl")

import datasets
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests.integrations.test_transformers import arguments
from tests.passes import trainable
from tests.properties import assert_same_bits
from tests.tiny_models import TEXT, llava, llava_batch
from torch_mdgd import MDGD, VisualTap
from torch_mdgd.integrations.transformers import MDGDTrainer, MDGDTrainerMixin

ROWS = 8
COUNTED = ("loss", "num_tokens", "mean_token_accuracy", "grad_norm", "entropy")


class MDGDSFTTrainer(MDGDTrainerMixin, SFTTrainer):
    pass


def collate(rows):
    whole = llava_batch(seed=0, images=ROWS)
    whole["attention_mask"][:] = 1
    return {name: x[[row["i"] for row in rows]] for name, x in whole.items()}


def tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0")


def trained(kind, folder, more=None, **options):
    model = llava()
    trainable(model)
    settings = {
        "output_dir": folder, "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 0.02, "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }  # fmt: skip
    args = SFTConfig(**{**settings, **(more or {})})
    # With a fingerprint, so that nothing has to be pickled to make one.
    rows = datasets.Dataset(datasets.table.InMemoryTable.from_pydict({"i": list(range(ROWS))}), fingerprint="rows")
    trainer = kind(
        model=model, args=args, train_dataset=rows, data_collator=collate, processing_class=tokenizer(), **options
    )
    trainer.train()
    return trainer


def test_without_regularisation_and_alignment_it_is_sft_trainer(tmp_path):
    # d = g: what is left is TRL, and what it counts in compute_loss it counts once.
    plain = trained(SFTTrainer, tmp_path)
    wrapped = trained(MDGDSFTTrainer, tmp_path, rule=MDGD(align=0.0, regularize=0.0))
    assert_same_bits(list(wrapped.model.parameters()), list(plain.model.parameters()))
    logs = [[{k: entry[k] for k in COUNTED if k in entry} for entry in t.state.log_history] for t in (wrapped, plain)]
    assert logs[0] == logs[1]
    assert "num_tokens" in logs[0][0]


def test_mdgd_trains_and_is_logged(tmp_path):
    trainer = trained(MDGDSFTTrainer, tmp_path)
    seen = [entry["visual_loss"] for entry in trainer.state.log_history if "visual_loss" in entry]
    assert seen[0] == 0 < min(seen[1:])
    assert len(seen) == 3
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_the_default_loss_which_projects_labelled_tokens_alone_leaves_z_as_it_is(tmp_path):
    """As the Trainer of transformers, whose loss is of all logits; of SGD, which does not enlarge rounding."""
    rule = {"rule": MDGD(0.5, regularize=0), "alignment": "mse"}
    seen = {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0}
    ours = trained(MDGDSFTTrainer, tmp_path, seen, **rule)
    model = llava()
    trainable(model)
    more = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "random", "remove_unused_columns": False}
    args = arguments(tmp_path, seed=42, **more, **seen)
    rows = [{"i": i} for i in range(ROWS)]
    wanted = MDGDTrainer(model=model, args=args, train_dataset=rows, data_collator=collate, **rule)
    wanted.train()
    logs = [[entry["visual_loss"] for entry in t.state.log_history if "loss" in entry] for t in (ours, wanted)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4, abs=1e-9)
    assert logs[0][0] == 0 < min(logs[0][1:])
    for x, y in zip(ours.model.parameters(), wanted.model.parameters(), strict=True):
        assert (x - y).abs().max() <= 1e-6 * (1 + y.abs().max())


class MDGDGRPOTrainer(MDGDTrainerMixin, GRPOTrainer):
    pass


def rewarded(kind, folder, **options):
    """Text alone, whose tokens are in what the trainer itself generates."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, pad_token_id=0, eos_token_id=1))
    words = tokenizer()
    words.padding_side = "left"
    if kind is MDGDGRPOTrainer:
        options["tap"] = VisualTap(model.model, no_pictures)
    args = GRPOConfig(
        output_dir=folder, max_steps=3, per_device_train_batch_size=2, num_generations=2, max_completion_length=4,
        learning_rate=0.02, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
        logging_steps=1, gradient_checkpointing=False, seed=3,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"prompt": ["w3 w4 w5"] * 4})
    trainer = kind(model=model, args=args, train_dataset=rows, processing_class=words, reward_funcs=reward, **options)
    trainer.train()
    return trainer


def no_pictures(batch):
    return torch.zeros_like(torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1), dtype=torch.bool)


def reward(completions, **kwargs):
    return [float(len(text) + i) for i, text in enumerate(completions)]


def test_grpo_whose_training_step_counts_and_generates(tmp_path):
    # d = g: what is left is TRL, bit for bit.
    plain = rewarded(GRPOTrainer, tmp_path)
    wrapped = rewarded(MDGDGRPOTrainer, tmp_path, rule=MDGD(align=0.0, regularize=0.0))
    assert wrapped._step == plain._step == 3
    assert_same_bits(list(wrapped.model.parameters()), list(plain.model.parameters()))
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    logs = [
        [{k: v for k, v in entry.items() if k not in (*timed, "visual_loss")} for entry in t.state.log_history]
        for t in (wrapped, plain)
    ]
    assert logs[0] == logs[1]
    assert "step_time" in wrapped.state.log_history[0]


class MDGDDPOTrainer(MDGDTrainerMixin, DPOTrainer):
    pass


def pairs(rows):
    """Chosen answers, then rejected ones, to the same pictures."""
    batch = collate(rows)
    del batch["labels"]
    both = {name: torch.cat([x, x]) for name, x in batch.items()}
    both["input_ids"][len(rows) :, -2:] = (both["input_ids"][len(rows) :, -2:] + 5) % 29
    both["completion_mask"] = torch.zeros_like(both["input_ids"])
    both["completion_mask"][:, -2:] = 1
    return both


def preferred(kind, folder, lora, **options):
    """DPO's own reference is a second model, or this one in a pass without adapters and without gradients."""
    model = llava()
    trainable(model)
    if lora:
        options["peft_config"] = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)")
    else:
        options["ref_model"] = llava()
    args = DPOConfig(
        output_dir=folder, max_steps=3, per_device_train_batch_size=2, learning_rate=0.05, report_to=[], use_cpu=True,
        bf16=False, disable_tqdm=True, save_strategy="no", logging_steps=1, gradient_checkpointing=False, seed=3,
        remove_unused_columns=False,
    )  # fmt: skip
    texts = {"prompt": ["w3 w4"] * ROWS, "chosen": ["w5"] * ROWS, "rejected": ["w6"] * ROWS}
    rows = datasets.Dataset.from_dict({"i": list(range(ROWS)), **texts})
    trainer = kind(
        model=model, args=args, train_dataset=rows, data_collator=pairs,
        processing_class=tokenizer(), **options,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("lora", [False, True])
def test_the_pass_of_dpos_own_reference_is_not_taken_for_the_taps(lora, tmp_path):
    plain = preferred(DPOTrainer, tmp_path, lora)
    wrapped = preferred(MDGDDPOTrainer, tmp_path, lora, rule=MDGD(align=0.0, regularize=0.0))
    assert_same_bits(list(wrapped.model.parameters()), list(plain.model.parameters()))
    seen = [entry["visual_loss"] for entry in wrapped.state.log_history if "visual_loss" in entry]
    assert seen[0] == 0 < min(seen[1:])

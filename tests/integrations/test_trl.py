"""TRL's SFTTrainer with the passes of MDGD, where TRL is installed."""

import pytest
import torch

pytest.importorskip("trl")

import datasets
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests.passes import trainable
from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD
from torch_mdgd.integrations.transformers import MDGDTrainerMixin

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


def trained(kind, folder, **options):
    model = llava()
    trainable(model)
    args = SFTConfig(
        output_dir=folder, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.02,
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, save_strategy="no",
        logging_steps=1, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    )  # fmt: skip
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

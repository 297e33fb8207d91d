"""Unsloth's trainer with MDGD on a random Llama. On a CPU it takes no pictures: a letter stands for image tokens."""

from unsloth import FastLanguageModel

# isort: split
# Unsloth comes before all that it changes.
import argparse

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from examples.tiny_folder import tokenizer
from torch_mdgd import VisualTap
from torch_mdgd.integrations.unsloth import MDGDUnslothTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--out", default="runs/unsloth")
parser.add_argument("--rule", default="MDGD(3.0, regularize=0)")
given = parser.parse_args()

torch.manual_seed(0)
words = tokenizer()
config = LlamaConfig(
    vocab_size=len(words),
    pad_token_id=words.pad_token_id,
    eos_token_id=words.eos_token_id,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
LlamaForCausalLM(config).save_pretrained(given.out)
words.save_pretrained(given.out)

model, words = FastLanguageModel.from_pretrained(
    given.out, load_in_4bit=False, dtype=torch.float32, local_files_only=True
)
model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "v_proj", "down_proj"])
letter = words.convert_tokens_to_ids("e")

MDGDUnslothTrainer(
    model=model,
    processing_class=words,
    train_dataset=Dataset.from_dict({"text": [f"ask {i}: the colour is red" for i in range(8)]}),
    args=SFTConfig(
        output_dir=given.out,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        logging_steps=1,
        save_steps=4,
        report_to="none",
        max_length=128,
        use_cpu=True,
        bf16=False,
    ),
    tap=VisualTap(model.get_base_model().model, lambda batch: batch["input_ids"] == letter),
    rule=given.rule,
).train()

"""TRL: the mixin before its SFTTrainer, and a rule beside the Trainer's own arguments."""

from datasets import Dataset
from tiny import make_model, make_samples, make_tokenizer
from transformers import default_data_collator
from trl import SFTConfig, SFTTrainer

from torch_mdgd import MDGD, connector, freeze_all_but, last_decoder_layers
from torch_mdgd.integrations.transformers import MDGDTrainerMixin


class MDGDSFTTrainer(MDGDTrainerMixin, SFTTrainer):
    """SFTTrainer with the passes of MDGD; its resume, logs and counters are its own."""


model = make_model()
freeze_all_but(model, [connector(model), *last_decoder_layers(model, 1)])
samples = [{name: x.tolist() for name, x in sample.items()} for sample in make_samples(16)]
for sample in samples:
    sample["attention_mask"] = [1] * len(sample["input_ids"])  # SFTTrainer counts tokens by it

trainer = MDGDSFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir="runs/trl",
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},  # the samples are tokens already
        remove_unused_columns=False,
    ),
    train_dataset=Dataset.from_list(samples),
    data_collator=default_data_collator,
    processing_class=make_tokenizer(),
    rule=MDGD(align=1.0, regularize=1.0),
)
trainer.train()

for entry in trainer.state.log_history[:-1]:
    print(f"step {entry['step']}: loss {entry['loss']:.3f}, visual loss {entry['visual_loss']:.4f}")

"""The Trainer of transformers: plain TrainingArguments, and a rule beside them."""

from tiny import make_model, make_samples
from transformers import TrainingArguments

from torch_mdgd import MDGD, connector, freeze_all_but, last_decoder_layers
from torch_mdgd.integrations.transformers import MDGDTrainer

model = make_model()
freeze_all_but(model, [connector(model), *last_decoder_layers(model, 1)])

trainer = MDGDTrainer(
    model=model,
    args=TrainingArguments(
        output_dir="runs/trainer",
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        warmup_steps=1,
        logging_steps=2,
        save_steps=3,
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=make_samples(16),
    rule=MDGD(align=1.0, regularize=1.0),  # or a function of the model; mask and compact go here too
    effective_rank_steps=2,
)
trainer.train()  # resume_from_checkpoint=True goes on where the last checkpoint was, bit for bit

for entry in trainer.state.log_history[:-1]:
    print(f"step {entry['step']}: loss {entry['loss']:.3f}, visual loss {entry['visual_loss']:.4f}")

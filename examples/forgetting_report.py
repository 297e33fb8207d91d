"""A number for what was lost: measured before, during and after training.

With your model's processor, ``ForgettingReport(model, processor)`` asks about drawn pictures, and the page shows what
the model answered before and after. Here there are batches alone, as a data loader makes them.
"""

from tiny import make_model, make_samples
from transformers import TrainingArguments, default_data_collator

from torch_mdgd import MDGD
from torch_mdgd.integrations.forgetting import ForgettingCallback
from torch_mdgd.integrations.transformers import MDGDTrainer
from torch_mdgd.report import ForgettingReport

model = make_model()
samples = make_samples(16)
old, new = default_data_collator(samples[:4]), default_data_collator(samples[4:8])
report = ForgettingReport(model, probes=[old], new_task=[new])

trainer = MDGDTrainer(
    model=model,
    args=TrainingArguments(
        output_dir="runs/forgetting",
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=samples[4:],
    rule=MDGD(align=1.0, regularize=0),
)
trainer.add_callback(ForgettingCallback(report, every=2, log=trainer.log))
trainer.train()

for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"step {entry['step']}: loss {entry['loss']:.3f}, visual loss {entry['visual_loss']:.4f}")
    elif "forgetting_probes_kl" in entry:
        print(f"step {entry['step']}: KL {entry['forgetting_probes_kl']:.4f} nats a token on what should stay")

found = report.history[-1]
found.show()
found.save_json("forgetting.json")
found.save_html("forgetting.html")  # open it in a browser; it needs no other file

"""DeepSpeed in the Trainer, ZeRO-2: `deepspeed examples/deepspeed_trainer.py`. Run plainly, it is one process of one.

Nothing is said of DeepSpeed but its configuration; `rule` is given as ever. LoRA, full fine-tuning and ZeRO-3 go the
same way.
"""

import os

from tiny import make_model, make_samples
from transformers import TrainingArguments

from torch_mdgd import MDGD
from torch_mdgd.integrations.transformers import MDGDTrainer

alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
for name, value in alone.items():
    os.environ.setdefault(name, value)

args = TrainingArguments(
    output_dir="runs/deepspeed_trainer",
    max_steps=6,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    warmup_steps=1,
    logging_steps=2,
    save_steps=3,
    report_to=[],
    deepspeed={
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
    },
)
model = make_model()
model.model.vision_tower.requires_grad_(False)
trainer = MDGDTrainer(model=model, args=args, train_dataset=make_samples(48), rule=MDGD(align=1.0, regularize=0))
trainer.train()  # resume_from_checkpoint=True goes on where the last checkpoint was, φ included

for entry in trainer.state.log_history[:-1]:
    print(f"step {entry['step']}: loss {entry['loss']:.3f}, visual loss {entry['visual_loss']:.4f}")

"""FSDP2 in the Trainer: `torchrun --nproc-per-node 2 examples/fsdp2_trainer.py`, on GPUs. Elsewhere nothing is sharded.

`accelerate launch` with `fsdp_version: 2` in its configuration does the same without the two arguments.
"""

import torch
from tiny import make_model, make_samples
from transformers import TrainingArguments

from torch_mdgd import MDGD, TopK
from torch_mdgd.integrations.transformers import MDGDTrainer

sharded = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}
model = make_model()
model.model.vision_tower.requires_grad_(False)
trainer = MDGDTrainer(
    model=model,
    args=TrainingArguments(
        output_dir="runs/fsdp2_trainer",
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=2,
        save_steps=3,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        **(sharded if torch.cuda.is_available() else {}),
    ),
    train_dataset=make_samples(48),
    rule=MDGD(align=1.0, regularize=1.0),
    mask=TopK(0.1),
)
trainer.train()  # resume_from_checkpoint=True goes on where the last checkpoint was

for entry in trainer.state.log_history[:-1]:
    print(f"step {entry['step']}: loss {entry['loss']:.3f}, visual loss {entry['visual_loss']:.4f}")

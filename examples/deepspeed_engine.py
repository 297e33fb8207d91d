"""DeepSpeed's engine by hand, ZeRO-3: `deepspeed examples/deepspeed_engine.py`. Run plainly, it is one process of one.

With accelerate it is the same: the model that `accelerator.prepare` returns is the engine.
"""

import os

import deepspeed
import torch
import torch.distributed as dist
from tiny import make_model, make_samples
from torch.utils.data import DataLoader, DistributedSampler

from torch_mdgd import MDGD, Anchor
from torch_mdgd.integrations.deepspeed import MDGDEngine

# What the launcher sets.
alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
for name, value in alone.items():
    os.environ.setdefault(name, value)

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 3},
}


def build():
    """The engine first, and the rule around it: φ is the weights that it holds."""
    model = make_model()
    model.model.vision_tower.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    rule = Anchor(model, 1.0, rule=MDGD(align=1.0, regularize=0, every=2))
    return engine, MDGDEngine(engine, rule)


def train(engine, mdgd, samples):
    """The loop as with DeepSpeed alone, but for one line."""
    for batch in DataLoader(samples, batch_size=2, sampler=DistributedSampler(samples, shuffle=False)):
        batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
        batch = {name: x.to(engine.device) for name, x in batch.items()}
        loss = mdgd.backward(batch)  # in place of engine.backward(engine(**batch).loss)
        engine.step()
        print(f"rank {dist.get_rank()}: loss {loss:.3f}")
    return mdgd.diagnostics.get("visual_loss", 0.0)


begun_here = not dist.is_initialized()
deepspeed.init_distributed()
samples = make_samples(16 * dist.get_world_size())
engine, mdgd = build()
train(engine, mdgd, samples[: len(samples) // 2])
engine.save_checkpoint("runs/deepspeed")
mdgd.save("runs/deepspeed")  # φ and what the rule holds, for any stage and any number of processes

# Later.
engine, mdgd = build()
engine.load_checkpoint("runs/deepspeed")
mdgd.load("runs/deepspeed")
visual = train(engine, mdgd, samples[len(samples) // 2 :])
if dist.get_rank() == 0:
    print(f"visual loss {visual:.4f}")
if begun_here:
    dist.destroy_process_group()

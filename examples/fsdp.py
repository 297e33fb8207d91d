"""FSDP2 and its checkpoints: `torchrun --nproc-per-node 2 examples/fsdp.py`. Run plainly, it is one process of one."""

import os

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import make_model, make_samples
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.utils.data import DataLoader, DistributedSampler

from torch_mdgd import MDGDOptimizer, TopK, mdgd_backward
from torch_mdgd.storage.entries import load_distributed

begun_here = not dist.is_initialized()
if "RANK" in os.environ and begun_here:  # torchrun has set it
    dist.init_process_group("gloo")
elif begun_here:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (dist.get_world_size(),))


def build():
    """Shard the model first, then wrap its optimizer."""
    model = make_model()
    model.model.vision_tower.requires_grad_(False)
    for part in (*model.model.language_model.layers, model):
        fully_shard(part, mesh=mesh)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, MDGDOptimizer(optimizer, mask=TopK(0.1), compact=True)


def train(model, optimizer, samples):
    """The loop as in one process; each rank takes its part of every batch."""
    for batch in DataLoader(samples, batch_size=2, sampler=DistributedSampler(samples, shuffle=False)):
        loss = mdgd_backward(model, optimizer, batch)
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {dist.get_rank()}: loss {loss:.3f}")  # this rank's own


samples = make_samples(16)
model, optimizer = build()
train(model, optimizer, samples[:8])
weights, state = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": state}, checkpoint_id="runs/fsdp")

# Later, with as many processes as you like. dcp.load does where the optimizer is not compact.
model, optimizer = build()
weights, state = get_state_dict(model, optimizer)
saved = {"model": weights, "optimizer": state}
load_distributed(saved, "runs/fsdp")
set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
train(model, optimizer, samples[8:])

# Diagnostics are of all ranks together, so one may print them.
if dist.get_rank() == 0:
    print(f"kept {optimizer.diagnostics['kept_fraction']:.2f}, visual loss {optimizer.diagnostics['visual_loss']:.4f}")
dist.barrier()
if begun_here:
    dist.destroy_process_group()

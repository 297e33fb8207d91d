"""Several processes: `torchrun --nproc-per-node 2 examples/ddp.py`. Run plainly, it is one process of one."""

import os

import torch
import torch.distributed as dist
from tiny import make_model, make_samples
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader, DistributedSampler

from torch_mdgd import MDGDOptimizer, mdgd_backward

begun_here = not dist.is_initialized()
if "RANK" in os.environ and begun_here:  # torchrun has set it
    dist.init_process_group("gloo")
elif begun_here:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

torch.manual_seed(0)
model = make_model()
model.model.vision_tower.requires_grad_(False)
optimizer = MDGDOptimizer(AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
model = DistributedDataParallel(model)

samples = make_samples(16)
loader = DataLoader(samples, batch_size=2, sampler=DistributedSampler(samples, shuffle=False))
for batch in loader:
    loss = mdgd_backward(model, optimizer, batch)  # averages all gradients over ranks before it combines them
    optimizer.step()
    optimizer.zero_grad()
    print(f"rank {dist.get_rank()}: loss {loss:.3f}")  # this rank's own

# Diagnostics are of all ranks together, so one may print them.
if dist.get_rank() == 0:
    print(f"visual loss {optimizer.diagnostics['visual_loss']:.4f}")
if begun_here:
    dist.destroy_process_group()

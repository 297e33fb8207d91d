"""A loop of one's own under accelerate: accumulation, clipping, a scheduler and mixed precision."""

from accelerate import Accelerator
from tiny import make_model, make_samples
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from torch_mdgd import MDGDOptimizer, TopK, mdgd_backward

STEPS = 2  # micro-batches a step

accelerator = Accelerator(gradient_accumulation_steps=STEPS, mixed_precision="bf16", cpu=True)
model = make_model()
model.model.vision_tower.requires_grad_(False)
parameters = [p for p in model.parameters() if p.requires_grad]

# Wrap first, then prepare. A tenth of the numbers moves; state and reference are kept for these alone.
optimizer = MDGDOptimizer(AdamW(parameters, lr=1e-2), mask=TopK(0.1), compact=True)
scheduler = CosineAnnealingLR(optimizer, T_max=4)
loader = DataLoader(make_samples(16), batch_size=2)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

for batch in loader:
    with accelerator.accumulate(model):
        loss = mdgd_backward(
            model,
            optimizer,
            batch,
            weight=1 / STEPS,
            scaler=accelerator.scaler,  # None unless mixed_precision="fp16"
            combine=accelerator.sync_gradients,
        )
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    print(f"loss {loss:.3f}")

# accelerate keeps the wrapper in .optimizer
diagnostics = optimizer.optimizer.diagnostics
print(f"kept {diagnostics['kept_fraction']:.2f}, visual loss {diagnostics['visual_loss']:.4f}")

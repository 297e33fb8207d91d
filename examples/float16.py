"""float16 with a gradient scaler: all four gradients carry its scale, and an overflow in any of them skips the step."""

import torch
from tiny import make_model, make_samples
from torch.optim import AdamW
from torch.utils.data import DataLoader

from torch_mdgd import MDGDOptimizer, mdgd_backward

device = "cuda" if torch.cuda.is_available() else "cpu"
model = make_model().to(device)
model.model.vision_tower.requires_grad_(False)
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = MDGDOptimizer(AdamW(parameters, lr=1e-2))
scaler = torch.amp.GradScaler(device, init_scale=2.0**12)  # it finds its scale by skipping steps

for batch in DataLoader(make_samples(16), batch_size=2):
    batch = {name: x.to(device) for name, x in batch.items()}
    with torch.autocast(device, torch.float16):
        loss = mdgd_backward(model, optimizer, batch, scaler=scaler)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    print(f"loss {loss:.3f}, scale {scaler.get_scale():.0f}, visual loss {optimizer.diagnostics['visual_loss']:.4f}")

"""The two lines of the README, on a random model: a plain loop with the recommended rule."""

import torch
from tiny import make_model, make_samples
from torch.utils.data import DataLoader

from torch_mdgd import MDGD, MDGDOptimizer, connector, freeze_all_but, last_decoder_layers, mdgd_backward

model = make_model()
parameters = freeze_all_but(model, [connector(model), *last_decoder_layers(model, 1)])
optimizer = torch.optim.AdamW(parameters, lr=1e-2)
optimizer = MDGDOptimizer(optimizer, MDGD(align=3.0, regularize=0))  # 1: the reference is the weights now

for batch in DataLoader(make_samples(16), batch_size=2):
    loss = mdgd_backward(model, optimizer, batch)  # 2: in place of loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss:.3f}, visual loss {optimizer.diagnostics['visual_loss']:.4f}")

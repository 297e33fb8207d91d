"""Adapters of peft. The reference φ is the adapters as they began, which is the pre-trained model.

In LoRA B begins at zero, so the gradient of A at φ is zero, and the reference says nothing about A: g~0 and with it
the regulariser are zero there, and a mask chosen at the first step lies in B. ``init_lora_weights="pissa"`` begins with
both. The visual gradient at the current weights, which the alignment uses, is there for A and B in any case.
"""

from peft import LoraConfig, get_peft_model
from tiny import make_model, make_samples
from torch.optim import AdamW
from torch.utils.data import DataLoader

from torch_mdgd import MDGDOptimizer, Project, mdgd_backward

config = LoraConfig(r=4, lora_dropout=0.1, target_modules=r".*language_model.*(q_proj|v_proj)")
model = get_peft_model(make_model(), config).train()
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = MDGDOptimizer(AdamW(parameters, lr=1e-2), Project(align=0.5))

for batch in DataLoader(make_samples(8), batch_size=2):
    loss = mdgd_backward(model, optimizer, batch)
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss:.3f}, visual loss {optimizer.diagnostics['visual_loss']:.4f}")

"""Modality-decoupled gradient descent for torch: fine-tune a vision-language model without blinding it.

optimizer = MDGDOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), align=1.0, regularize=1.0)
loss = mdgd_backward(model, optimizer, batch)  # in place of loss.backward()
optimizer.step()
"""

from torch_mdgd.backward import mdgd_backward
from torch_mdgd.diagnostics import effective_rank
from torch_mdgd.masking import TopK
from torch_mdgd.optimizer import MDGDOptimizer
from torch_mdgd.visual import VisualTap, visual_alignment_loss

__all__ = ["MDGDOptimizer", "TopK", "VisualTap", "effective_rank", "mdgd_backward", "visual_alignment_loss"]

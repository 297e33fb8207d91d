"""A rule of one's own, in ten lines: where g and v disagree, the part of g that raises the visual loss is removed.

This is gradient surgery (PCGrad, NeurIPS 2020) with v as the other task, and a little of v on top. A mask, compact
storage, checkpoints and several processes go with it as with any rule of the package.
"""

import io

import torch
from tiny import make_model, make_samples
from torch.optim import AdamW
from torch.utils.data import DataLoader

from torch_mdgd import MDGDOptimizer, Rule, TopK, mdgd_backward


class Surgery(Rule):
    """d = g + (α − min(0, ⟨g, v⟩ / ⟨v, v⟩)) v."""

    def __init__(self, align: float = 0.1) -> None:
        self.weights = {"align": align}  # of each parameter group, as "mdgd_align"

    def coefficients(self, products, w, masked):
        """What g and v are multiplied with; products[:, 0, 1] is ⟨g, v⟩."""
        out = torch.zeros_like(products[:, 0])
        out[:, 0] = 1
        if products.shape[-1] > 1:  # there are pictures in this step
            out[:, 1] = w["align"] - self.drift(products).clamp(max=0)
        return out


def wrap(model: torch.nn.Module) -> MDGDOptimizer:
    """The optimizer of a model, with this rule, a tenth of the elements, and state for these alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return MDGDOptimizer(AdamW(trained, lr=1e-2), Surgery(), mask=TopK(0.1), compact=True)


def train(model: torch.nn.Module, optimizer: MDGDOptimizer) -> None:
    """One pass over the samples."""
    for batch in DataLoader(make_samples(8), batch_size=2):
        loss = mdgd_backward(model, optimizer, batch)
        optimizer.step()
        optimizer.zero_grad()
        shown = optimizer.diagnostics
        print(f"loss {loss:.3f}, visual loss {shown['visual_loss']:.4f}, {shown['kept_fraction']:.0%} may move")


model = make_model()
model.model.vision_tower.requires_grad_(False)
optimizer = wrap(model)
train(model, optimizer)

checkpoint = io.BytesIO()
torch.save((model.state_dict(), optimizer.state_dict()), checkpoint)
checkpoint.seek(0)
weights, state = torch.load(checkpoint)

resumed = make_model()
resumed.model.vision_tower.requires_grad_(False)
its_optimizer = wrap(resumed)
resumed.load_state_dict(weights)
its_optimizer.load_state_dict(state)
for m, o in ((model, optimizer), (resumed, its_optimizer)):
    train(m, o)
same = all(torch.equal(p, x) for p, x in zip(model.parameters(), resumed.parameters(), strict=True))
print(f"the resumed run is the uninterrupted one: {same}")

"""A state dict that knows of no mask leaves the present one."""

import pytest
import torch
from torch import nn

from torch_mdgd import MDGD, Given, Magnitude, MDGDOptimizer, Random

MASKS = {"Random": Random(0.1), "Magnitude": Magnitude(0.1), "Given": Given([torch.arange(100) % 10 == 0])}
SAVED = {
    "the plain optimizer": lambda base: base,
    "no mask": lambda base: MDGDOptimizer(base, MDGD(regularize=0)),
}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.filterwarnings("ignore:the state dict holds no reference")
def test_only_the_masks_tenth_moves(saved, mask, compact, stepped):
    p = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))
    other = SAVED[saved](torch.optim.AdamW([p], lr=0.01))
    if stepped:
        p.grad = torch.ones(100)
        other.step()
        other.zero_grad()
    optimizer = MDGDOptimizer(torch.optim.AdamW([p], lr=0.01), MDGD(regularize=0), mask=MASKS[mask], compact=compact)
    if compact and saved == "no mask":
        with pytest.raises(ValueError, match="compact=False"):
            optimizer.load_state_dict(other.state_dict())
        return
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.diagnostics["kept_fraction"] == 0.1
    before = p.detach().clone()
    for _ in range(2):
        optimizer.set_gradients(task=[torch.ones(100)], visual=[None])
        optimizer.step()
        optimizer.zero_grad()
    assert int((p != before).sum()) == 10

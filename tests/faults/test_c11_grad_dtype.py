"""A parameter whose ``.grad`` has a dtype of its own is stepped as the wrapped optimizer steps it."""

import pytest
import torch
from torch import nn

from tests.properties import assert_same_bits
from torch_mdgd import MDGD, Given, MDGDOptimizer, Project, StepProject

RULES = {"MDGD": MDGD, "Project": Project, "StepProject": StepProject}
# All elements, so that compact storage steps as the dense one.
STORAGES = {"dense": {}, "masked": {"mask": 1}, "compact": {"mask": 1, "compact": True}}


def make():
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    return p


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rule", RULES)
def test_a_float32_gradient_of_a_bfloat16_parameter(rule, storage, captured):
    # 1 + 2⁻¹² has no place in bfloat16.
    g = torch.tensor([1 + 2.0**-12, -1.0, 0.25, 3.0])
    bare = make()
    bare.grad = g.clone()
    torch.optim.SGD([bare], lr=0.5).step()
    p = make()
    settings = {
        **STORAGES[storage],
        **({"mask": Given([torch.ones(4, dtype=torch.bool)])} if storage != "dense" else {}),
    }
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=0.5), RULES[rule](), **settings)
    if captured:
        with optimizer.capture("task"):
            p.grad = g.clone()
    else:
        optimizer.set_gradients(task=[g])
    optimizer.set_gradients(**{kind: [None] for kind in optimizer.needs() if kind != "task"})
    optimizer.combine()
    assert_same_bits([p.grad], [g])
    optimizer.step()
    assert_same_bits([p], [bare])

"""Two wrappers on one model, as Muon for matrices and AdamW for the rest, leave each other's gradients alone."""

import copy

import pytest
import torch

from tests.networks import losses, network
from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD, MDGDOptimizer, Project, StepProject, connector, freeze_all_but, mdgd_backward

RULES = {"Project": Project, "MDGD": MDGD, "StepProject": StepProject}


def wrap(model, rule, two):
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() == 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() != 2]
    bases = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01)]
    if two:
        return [MDGDOptimizer(base, RULES[rule]()) for base in bases]
    # One at a time, on a model of its own.
    return bases


@pytest.mark.parametrize("rule", RULES)
def test_each_combines_what_it_would_alone(rule):
    # MDGD, projection and correction are each parameter's own.
    model = network(torch.float32)
    optimizers = wrap(model, rule, two=True)
    alone = [copy.deepcopy(model) for _ in optimizers]
    for optimizer in optimizers:
        capture(model, optimizer)
        optimizer.combine()
    found = [p.grad for p in model.parameters()]
    for which, other in enumerate(alone):
        optimizer = wrap(other, rule, two=True)[which]
        other.zero_grad()
        capture(other, optimizer)
        optimizer.combine()
        held = {id(p) for p in optimizer.parameters}
        for x, p in zip(found, other.parameters(), strict=True):
            if id(p) in held:
                assert_same_bits([x], [p.grad])


def capture(model, optimizer):
    others = [p for p in model.parameters() if id(p) not in {id(q) for q in optimizer.parameters}]
    held = [p.grad for p in others]
    for p in others:
        p.grad = None
    kinds = optimizer.needs()
    if "reference_task" in kinds:
        with optimizer.reference():
            capture_both(model, optimizer)
    capture_both(model, optimizer)
    for p, x in zip(others, held, strict=True):
        p.grad = x


def capture_both(model, optimizer):
    for kind, loss in zip(("visual", "task"), losses(model), strict=True):
        with optimizer.capture(kind):
            loss.backward()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.filterwarnings("ignore:.*their .grad stays as it is")
def test_mdgd_backward_for_each_leaves_what_the_other_has_combined(order):
    def make():
        model = llava().train()
        freeze_all_but(model, [connector(model)])
        return model, wrap(model, "Project", two=True)

    model, optimizers = make()
    batch = llava_batch()
    wanted = []
    for which in order:
        other, its = make()
        mdgd_backward(other, its[which], batch)
        wanted.append([p.grad.clone() for p in its[which].parameters])
    for which in order:
        mdgd_backward(model, optimizers[which], batch)
    for which, d in zip(order, wanted, strict=True):
        assert_same_bits([p.grad for p in optimizers[which].parameters], d)
    before = copy.deepcopy(list(model.parameters()))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    trained = [(p, x) for p, x in zip(model.parameters(), before, strict=True) if p.requires_grad]
    assert not any(torch.equal(p, x) for p, x in trained)

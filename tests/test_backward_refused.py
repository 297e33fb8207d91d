"""What the passes of one step refuse, and what an error leaves behind."""

import types

import pytest
import torch
from torch import nn

from tests.passes import double_batch, drifted, grads
from tests.properties import assert_same_bits
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGDOptimizer, VisualTap, mdgd_backward


def test_a_batch_without_labels_is_refused_and_leaves_nothing():
    model, _, optimizer = drifted()
    now = [p.detach().clone() for p in optimizer.parameters]
    batch = double_batch()
    del batch["labels"]
    with pytest.raises(RuntimeError, match="returned no loss; does the batch have labels"):
        mdgd_backward(model, optimizer, batch)
    assert_same_bits(optimizer.parameters, now)
    mdgd_backward(model, optimizer, double_batch())


def test_training_only_what_comes_after_z_is_refused():
    model = llava()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.lm_head.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="no trainable parameter influences the hidden states at image tokens"):
        mdgd_backward(model, optimizer, llava_batch())


def test_together_refuses_a_model_that_writes_over_what_its_backward_pass_needs():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x, marks):
            hidden = self.body(x).exp()
            loss = self.head(hidden).square().mean()
            with torch.no_grad():
                hidden.add_(1)
            return types.SimpleNamespace(loss=loss)

    model = Writing()
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    batch = {"x": torch.randn(2, 5, 3), "marks": torch.ones(2, 5, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match="wrote over a tensor that its backward pass needs"):
        mdgd_backward(model, optimizer, batch, tap=VisualTap(model.body, lambda b: b["marks"]), schedule="together")


def test_an_unknown_schedule_is_refused():
    model, _, optimizer = drifted()
    with pytest.raises(ValueError, match="schedule must be 'sequential' or 'together', got 'both'"):
        mdgd_backward(model, optimizer, double_batch(), schedule="both")


def test_another_optimizer_is_refused():
    model = llava()
    with pytest.raises(TypeError, match="optimizer must be an MDGDOptimizer, got SGD"):
        mdgd_backward(model, torch.optim.SGD(model.parameters(), lr=0.1), llava_batch())


def test_micro_batches_of_two_loss_scales_are_refused_and_leave_nothing():
    model, _, optimizer = drifted()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    mdgd_backward(model, optimizer, double_batch(), scaler=scaler, combine=False)
    scaler.update(512.0)
    with pytest.raises(ValueError, match=r"capture of reference_visual: loss scale 512\.0 differs from 1024\.0"):
        mdgd_backward(model, optimizer, double_batch(), scaler=scaler)
    assert not optimizer.captured


@pytest.mark.parametrize(("at", "schedule"), [(1, "sequential"), (2, "sequential"), (3, "sequential"), (2, "together")])
def test_a_step_that_failed_half_way_can_be_tried_again(at, schedule):
    outcomes = []
    for fails in (False, True):
        model, _, optimizer = drifted(dropout=0.0)
        tap, batch = VisualTap.for_model(model), double_batch()

        class Failing(VisualTap):
            calls = 0

            def __call__(self, model, batch):
                self.calls += 1
                if self.calls == at:
                    raise MemoryError
                return super().__call__(model, batch)

        if fails:
            now = [p.detach().clone() for p in optimizer.parameters]
            with pytest.raises(MemoryError):
                mdgd_backward(model, optimizer, batch, tap=Failing(tap.text_module, tap.mask), schedule=schedule)
            assert_same_bits(optimizer.parameters, now)
            assert not optimizer.captured
        mdgd_backward(model, optimizer, batch, schedule=schedule)
        outcomes.append(grads(optimizer))
    assert_same_bits(*outcomes)

"""What the passes of one step refuse, and what an error leaves behind."""

import pytest
import torch

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


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_step_that_failed_half_way_can_be_tried_again(at):
    outcomes = []
    for fails in (False, True):
        model, _, optimizer = drifted(dropout=0.0)
        tap, batch = VisualTap.for_model(model), double_batch()

        class Failing(VisualTap):
            calls = 0

            def count(self):
                self.calls += 1
                if self.calls == at:
                    raise MemoryError

            def __call__(self, model, batch):
                self.count()
                return super().__call__(model, batch)

            def features(self, model, batch, **options):
                self.count()
                return super().features(model, batch, **options)

        if fails:
            now = [p.detach().clone() for p in optimizer.parameters]
            with pytest.raises(MemoryError):
                mdgd_backward(model, optimizer, batch, tap=Failing(tap.text_module, tap.mask))
            assert_same_bits(optimizer.parameters, now)
            assert not optimizer.captured
        mdgd_backward(model, optimizer, batch)
        outcomes.append(grads(optimizer))
    assert_same_bits(*outcomes)

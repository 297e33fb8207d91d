"""The mixin before a Trainer with a training step of its own: that step is run, or refused by name."""

import pytest
import torch
from transformers import Trainer

from tests.integrations.test_transformers import CountingTrainer, arguments, dataset, train, weights
from tests.properties import assert_same_bits
from torch_mdgd import MDGD
from torch_mdgd.integrations.transformers import MDGDTrainer, MDGDTrainerMixin

SETTINGS = {"rule": MDGD(0.5, 1.0)}


class Counting(CountingTrainer):
    """As GRPO's and RLOO's: they count and time there, and prepare their inputs once."""

    steps, prepared = 0, 0

    def training_step(self, *args, **kwargs):
        out = super().training_step(*args, **kwargs)
        type(self).steps += 1
        return out

    def _prepare_inputs(self, inputs):
        type(self).prepared += 1
        return super()._prepare_inputs(inputs)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_it_is_run_once_for_each_micro_batch(micro_batches, tmp_path):
    class Mine(MDGDTrainerMixin, Counting):
        pass

    more = {"gradient_accumulation_steps": micro_batches}
    ours = train(Mine, tmp_path, settings=SETTINGS, **more)
    wanted = train(MDGDTrainer, tmp_path, settings=SETTINGS, **more)
    assert (Mine.steps, Mine.prepared) == (3 * micro_batches,) * 2
    assert len(ours._metrics["train"]["loss"]) == 3 * micro_batches
    assert_same_bits(weights(ours), weights(wanted))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (ours, wanted)]
    assert losses[0] == losses[1]
    assert "compute_loss" not in vars(ours)
    assert "backward" not in vars(ours.accelerator)


class OwnBackward(Trainer):
    """As TRL's online DPO."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class Twice(Trainer):
    def training_step(self, *args, **kwargs):
        super().training_step(*args, **kwargs)
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(OwnBackward, "has a backward pass of its own"), (Twice, "calls compute_loss more than once")],
)
def test_a_backward_pass_that_could_not_be_replaced_is_refused(kind, message, tmp_path):
    class Mine(MDGDTrainerMixin, kind):
        pass

    with pytest.raises(RuntimeError, match=f"Mine: its training step {message}"):
        train(Mine, tmp_path)


def test_under_autocast_no_pass_sees_weights_of_another(tmp_path):
    """Each pass enters the Trainer's context by itself: autocast would keep what it has cast of the weights at φ."""

    class Cast(Trainer):
        def compute_loss_context_manager(self):
            return torch.autocast("cpu", torch.bfloat16)

    class Mine(MDGDTrainerMixin, Cast):
        pass

    ours = train(Mine, tmp_path, settings=SETTINGS)
    wanted = train(MDGDTrainer, tmp_path, settings=SETTINGS, bf16=True)
    assert_same_bits(weights(ours), weights(wanted))


def test_a_step_that_fails_leaves_the_trainer_as_it_was(tmp_path):
    class Failing(Trainer):
        def compute_loss(self, *args, **kwargs):
            raise ZeroDivisionError

    class Mine(MDGDTrainerMixin, Failing):
        pass

    trainer = Mine(model=train(MDGDTrainer, tmp_path).model, args=arguments(tmp_path), train_dataset=dataset())
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "compute_loss" not in vars(trainer)
    assert "backward" not in vars(trainer.accelerator)

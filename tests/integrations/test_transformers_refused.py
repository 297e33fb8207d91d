"""What MDGDTrainer refuses, and that a user then reads what to do."""

import pytest
import torch

from tests.integrations.test_transformers import CountingTrainer, arguments, dataset
from tests.passes import trainable
from tests.tiny_models import llava
from torch_mdgd import MDGD, MDGDOptimizer
from torch_mdgd.integrations.transformers import MDGDTrainer, MDGDTrainerMixin


def test_an_optimizer_wrapped_twice_is_refused(tmp_path):
    model = llava()
    optimizer = MDGDOptimizer(torch.optim.SGD(trainable(model), lr=0.1))
    trainer = MDGDTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=dataset(),
        optimizers=(optimizer, None),
        rule=MDGD(align=2.0),
    )
    with pytest.raises(ValueError, match="an MDGDOptimizer already: leave out rule and mask, or pass its base"):
        trainer.train()


def test_reentrant_checkpointing_is_refused(tmp_path):
    args = arguments(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r"does not support .*use_reentrant.*use False"):
        MDGDTrainer(model=llava(), args=args, train_dataset=dataset())


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_during_the_backward_pass_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match="does not support optimizers that step during the backward pass"):
        MDGDTrainer(model=llava(), args=arguments(tmp_path, optim=optim), train_dataset=dataset())


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"does not support DataParallel .*use one, or torchrun"):
        MDGDTrainer(model=llava(), args=args, train_dataset=dataset())


def test_the_mixin_behind_the_trainer_is_refused():
    with pytest.raises(TypeError, match="class Wrong: put MDGDTrainerMixin before the Trainer"):
        type("Wrong", (CountingTrainer, MDGDTrainerMixin), {})


def test_a_model_of_another_kind_needs_a_tap(tmp_path):
    with pytest.raises(TypeError, match="not a model of transformers"):
        MDGDTrainer(model=torch.nn.Linear(2, 2), args=arguments(tmp_path), train_dataset=dataset())


def test_fsdp1_is_refused(tmp_path):
    class Sharding(MDGDTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    with pytest.raises(ValueError, match=r"MDGDTrainer does not support FSDP1.*set version 2 in fsdp_config"):
        Sharding(model=llava(), args=arguments(tmp_path), train_dataset=dataset())

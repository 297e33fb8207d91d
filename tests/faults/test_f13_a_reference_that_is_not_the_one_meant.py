"""The Trainer's φ: after a checkpoint without optimizer state, and when train() is called again."""

import warnings

import pytest
import torch
from transformers import TrainerCallback

from tests.integrations.test_transformers import arguments, dataset, train
from tests.passes import trainable
from tests.properties import assert_same_bits
from tests.tiny_models import llava
from torch_mdgd import MDGD, MDGDOptimizer
from torch_mdgd.backward import find_optimizer
from torch_mdgd.integrations.transformers import MDGDTrainer

LOST, AGAIN = "so φ is the fine-tuned weights in it", r"train\(\) is called again"
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def fresh():
    model = llava()
    trainable(model)
    return model, trained(model)


def trained(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def reference(trainer):
    with find_optimizer(trainer.optimizer).reference():
        return trained(trainer.model)


def resume(folder, **options):
    model, start = fresh()
    trainer = MDGDTrainer(model=model, args=arguments(folder, max_steps=4), train_dataset=dataset(), **options)
    return trainer, start


def test_save_only_model_then_resume_says_that_phi_is_lost_and_how_to_set_it(tmp_path):
    train(MDGDTrainer, tmp_path, llava(), save_only_model=True, **SAVED)
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer, start = resume(tmp_path)
    with pytest.warns(UserWarning, match=LOST):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert any(not torch.equal(x, y) for x, y in zip(reference(trainer), start, strict=True))

    class SetReference(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            wrapped = find_optimizer(optimizer)
            values = dict(zip((p for p in model.parameters() if p.requires_grad), start, strict=True))
            wrapped.set_reference([values[p] for p in wrapped.parameters])

    trainer, start = resume(tmp_path, callbacks=[SetReference()])
    with pytest.warns(UserWarning, match=LOST):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert_same_bits(reference(trainer), start)


def test_an_optimizer_that_was_wrapped_before_the_weights_were_loaded_has_the_right_phi(tmp_path):
    train(MDGDTrainer, tmp_path, llava(), save_only_model=True, **SAVED)
    model, start = fresh()
    wrapped = MDGDOptimizer(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), MDGD(0.5, 0))
    args = arguments(tmp_path, max_steps=4)
    trainer = MDGDTrainer(model=model, args=args, train_dataset=dataset(), optimizers=(wrapped, None))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*φ is the fine-tuned weights")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_bits(reference(trainer), start)


def test_a_whole_checkpoint_brings_phi(tmp_path):
    train(MDGDTrainer, tmp_path, llava(), **SAVED)
    trainer, start = resume(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*φ is the fine-tuned weights")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_bits(reference(trainer), start)


def test_train_called_twice_keeps_the_first_runs_phi_and_says_so(tmp_path):
    model, start = fresh()
    trainer = MDGDTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=dataset())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=AGAIN)
        trainer.train()
    with pytest.warns(UserWarning, match=AGAIN):
        trainer.train()
    assert_same_bits(reference(trainer), start)
    find_optimizer(trainer.optimizer).set_reference()
    assert_same_bits(reference(trainer), trained(trainer.model))

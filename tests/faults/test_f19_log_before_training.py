"""Trainer.log({"loss": ...}) before train(), as from a callback or from compute_loss in evaluate()."""

import torch

from tests.integrations.test_transformers import arguments, dataset
from tests.passes import trainable
from tests.tiny_models import llava
from torch_mdgd.integrations.transformers import MDGDTrainer


def test_what_is_logged_is_what_was_given(tmp_path):
    model = llava()
    trainable(model)
    trainer = MDGDTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=dataset())
    trainer.log({"loss": 1.0})
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.log({"loss": 2.0})
    assert [entry["loss"] for entry in trainer.state.log_history] == [1.0, 2.0]
    assert not any("visual_loss" in entry for entry in trainer.state.log_history)

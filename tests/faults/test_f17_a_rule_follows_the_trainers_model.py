"""A rule that looks at the model, where the Trainer makes the model itself: a function of it."""

import pytest
import torch
from peft import LoraConfig

from tests.integrations.test_transformers import arguments, dataset
from tests.passes import trainable
from tests.tiny_models import llava
from torch_mdgd import Anchor, DriftBudget, Project, ProtectInputs
from torch_mdgd.backward import find_optimizer
from torch_mdgd.integrations.transformers import MDGDTrainer

pytestmark = pytest.mark.filterwarnings("ignore:Anchor holds linear layers")


def made():
    model = llava()
    trainable(model)
    return model


@pytest.mark.parametrize("kind", [ProtectInputs, Anchor])
def test_model_init(kind, tmp_path):
    trainer = MDGDTrainer(
        model_init=made, args=arguments(tmp_path, max_steps=1), train_dataset=dataset(), rule=lambda model: kind(model)
    )
    seen = []
    for _ in range(2):
        trainer.train()
        rule = find_optimizer(trainer.optimizer).rule
        inner = dict(trainer.model.named_modules())
        held = rule._layers if kind is ProtectInputs else rule.layers
        layers = {layer.name: layer.module for layer in held}
        assert layers
        assert all(inner[name] is module for name, module in layers.items())
        seen.append(rule)
    assert seen[0] is not seen[1]


def test_one_rule_for_all_calls_is_refused_and_the_message_says_what_to_do(tmp_path):
    trainer = MDGDTrainer(
        model_init=made, args=arguments(tmp_path, max_steps=1), train_dataset=dataset(),
        rule=DriftBudget(Project(), 0.1),
    )  # fmt: skip
    trainer.train()
    with pytest.raises(ValueError, match=r"DriftBudget belongs to another .* a function of the model"):
        trainer.train()


@pytest.mark.parametrize("kind", [ProtectInputs, Anchor])
def test_peft_config_of_trl(kind, tmp_path):
    pytest.importorskip("trl")
    from tests.integrations.test_trl import MDGDSFTTrainer, trained

    config = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)", init_lora_weights=False)
    trainer = trained(MDGDSFTTrainer, tmp_path, rule=kind, peft_config=config)
    optimizer = find_optimizer(trainer.optimizer)
    assert type(optimizer.rule) is kind
    adapters = [p for name, p in trainer.model.named_parameters() if "lora_" in name]
    assert {id(p) for p in optimizer.parameters} == {id(p) for p in adapters}
    with optimizer.reference():
        phi = [p.detach().clone() for p in adapters]
    assert any(not torch.equal(p, x) for p, x in zip(adapters, phi, strict=True))
    assert all(p.isfinite().all() for p in adapters)

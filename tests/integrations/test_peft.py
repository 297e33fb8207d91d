"""Adapters of peft: φ is the adapters as they began, and the update is that of any parameters."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.integrations.test_transformers import arguments, dataset
from tests.passes import by_hand, double_batch, grads
from tests.properties import assert_close, assert_same_bits, expected
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGDOptimizer, TopK, mdgd_backward
from torch_mdgd.backward import find_optimizer
from torch_mdgd.integrations.transformers import MDGDTrainer

KINDS = {
    "lora": {"lora_dropout": 0.2},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}


def adapted(kind, base=None):
    config = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)", **KINDS[kind])
    torch.manual_seed(1)
    return get_peft_model(base or llava(), config).train()


def adapters(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_version_by_hand_with_a_second_model(kind, checkpointed):
    model = adapted(kind).double()
    phi = copy.deepcopy(model)
    optimizer = MDGDOptimizer(torch.optim.SGD(adapters(model), lr=0.1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in optimizer.parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    roles = by_hand(model, phi, double_batch())
    if checkpointed:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    mdgd_backward(model, optimizer, double_batch())
    assert_close(grads(optimizer), expected(roles, optimizer.parameters), roles)
    assert optimizer.diagnostics["visual_to_task"] > 0


def gradients_at_the_reference(model):
    optimizer = MDGDOptimizer(torch.optim.SGD(adapters(model), lr=0.1))
    with optimizer.reference(), optimizer.capture("task"):
        model(**llava_batch()).loss.backward()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = dict(zip(names, optimizer.captured["reference_task"], strict=True))
    return [[x for name, x in found.items() if f"lora_{letter}" in name] for letter in "AB"]


def test_at_the_beginning_of_lora_only_b_has_a_gradient():
    a, b = gradients_at_the_reference(adapted("lora"))
    assert not any(x.any() for x in a)
    assert all(x.any() for x in b)


def test_at_the_beginning_of_pissa_both_have():
    a, b = gradients_at_the_reference(adapted("pissa"))
    assert all(x.any() for x in [*a, *b])


def test_a_mask_chosen_at_the_first_step_of_lora_lies_in_b():
    model = adapted("lora")
    optimizer = MDGDOptimizer(torch.optim.SGD(adapters(model), lr=0.1), mask=TopK(0.2))
    mdgd_backward(model, optimizer, llava_batch())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    masks = [entry["mdgd_mask"] for entry in optimizer.state_dict()["state"].values()]
    assert not any(mask.any() for name, mask in zip(names, masks, strict=True) if "lora_A" in name)
    assert sum(int(mask.sum()) for mask in masks) == round(0.2 * sum(p.numel() for p in adapters(model)))


def test_the_reference_is_the_model_without_adapters():
    model = adapted("lora").eval()
    optimizer = MDGDOptimizer(torch.optim.SGD(adapters(model), lr=0.1))
    wanted = model(**llava_batch()).logits.detach()
    mdgd_backward(model, optimizer, llava_batch())
    optimizer.step()
    assert not torch.equal(model(**llava_batch()).logits, wanted)
    with optimizer.reference():
        assert torch.equal(model(**llava_batch()).logits, wanted)
    with model.disable_adapter():
        assert torch.equal(model(**llava_batch()).logits, wanted)


# test_other_optimizers.py resumes each kind, with a rule of fewer passes.
@pytest.mark.parametrize("kind", ["lora", "pissa"])
def test_a_resumed_trainer_is_the_uninterrupted_one(kind, tmp_path):
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def train(resume=None):
        model = adapted(kind)
        trainer = MDGDTrainer(model=model, args=arguments(tmp_path, **more), train_dataset=dataset())
        if resume is not None:
            with torch.no_grad():
                for p in adapters(model):
                    p.add_(1)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train()
    resumed = train(str(tmp_path / "checkpoint-2"))
    assert_same_bits(adapters(resumed.model), adapters(whole.model))
    states = [find_optimizer(trainer.optimizer).state_dict()["state"] for trainer in (resumed, whole)]
    for key in states[1]:
        assert_same_bits(*[[state[key]["mdgd_reference"]] for state in states])

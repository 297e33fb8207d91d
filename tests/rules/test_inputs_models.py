"""Protected inputs in vision-language models: the passes, what layers share, and what is run again."""

import pytest
import torch

from tests.properties import assert_same_bits
from tests.tiny_models import IMAGE, llava, llava_batch, text_batch
from torch_mdgd import MDGDOptimizer, ProtectInputs, VisualTap, mdgd_backward


def vlm(**options):
    model = llava(**options).double().train()
    for name, p in model.named_parameters():
        p.requires_grad_("projector" in name or "layers.1" in name or "lm_head" in name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    base = torch.optim.AdamW(parameters, lr=1e-2)
    optimizer = MDGDOptimizer(base, ProtectInputs(model, 0.7, refresh=2))
    return model, optimizer


def double(batch):
    return {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}


def test_a_vision_language_model_step_runs_forward_and_backward_once():
    model, optimizer = vlm()
    calls = []
    model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    inside = model.model.language_model.layers[1].mlp.down_proj
    seen_inputs = []
    inside.register_forward_pre_hook(lambda _, args: seen_inputs.append(args[0].detach()))
    data = double(llava_batch())
    wanted = torch.autograd.grad(model(**data).loss, optimizer.parameters)
    calls.clear()
    seen_inputs.clear()
    mdgd_backward(model, optimizer, data)
    assert len(calls) == 1
    assert_same_bits([p.grad for p in optimizer.parameters], list(wanted))
    optimizer.step()
    optimizer.zero_grad()
    names = {name: i for i, name in optimizer.rule.names.items()}
    x = seen_inputs[0][data["input_ids"] == IMAGE]
    c = optimizer.rule.covariances[names["model.language_model.layers.1.mlp.down_proj"]]
    assert torch.allclose(c, 0.05 * x.T @ x / len(x), rtol=1e-12)
    # Norm weights alone are not protected.
    rest = [p for i, p in enumerate(optimizer.parameters) if i not in optimizer.rule.names and p.dim() > 1]
    assert not rest
    mdgd_backward(model, optimizer, double(text_batch()))
    optimizer.step()
    assert torch.allclose(c, 0.05 * x.T @ x / len(x), rtol=1e-12)


def test_layers_that_see_the_same_tensor_count_it_each():
    model, optimizer = vlm()
    attention, entered = model.model.language_model.layers[1].self_attn, []
    attention.q_proj.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach()))
    batches = [double(llava_batch(0)), double(llava_batch(1, images=1))]
    for i, data in enumerate(batches):
        mdgd_backward(model, optimizer, data, combine=i == 1)
    optimizer.step()
    x = torch.cat([h[data["input_ids"] == IMAGE] for h, data in zip(entered, batches, strict=True)])
    found = {name.rpartition(".")[2]: optimizer.rule.covariances[i] for i, name in optimizer.rule.names.items()}
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.allclose(found[name], 0.05 * x.T @ x / len(x), rtol=1e-12)
    assert not torch.allclose(found["o_proj"], found["q_proj"])


def test_gradient_checkpointing_of_a_model_counts_once():
    found = []
    for recompute in (False, True):
        model, optimizer = vlm()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for seed in range(3):
            mdgd_backward(model, optimizer, double(llava_batch(seed)))
            optimizer.step()
            optimizer.zero_grad()
        found.append([*optimizer.rule.covariances.values(), *optimizer.parameters])
    for x, y in zip(*found, strict=True):
        # What is run again may be rounded otherwise, which Adam enlarges where a gradient is small.
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-8)


def test_lora_layers_are_layers():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(llava().double(), config).double()
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer = MDGDOptimizer(base, ProtectInputs(model, 0.5, refresh=1))
    assert len(optimizer.rule.names) == len(optimizer.parameters)
    tap = VisualTap.for_model(model)
    for seed in range(2):
        before = [p.detach().clone() for p in optimizer.parameters]
        mdgd_backward(model, optimizer, double(llava_batch(seed)), tap=tap)
        optimizer.step()
        optimizer.zero_grad()
    for i, q in optimizer.rule.bases.items():
        move = optimizer.parameters[i] - before[i]
        assert 0 < q.shape[1] < len(q)
        assert move.abs().max() > 1e-6 > 1e-12 > (move @ q).abs().max()

"""The frozen vision tower is run once a batch, and nothing else changes."""

import types

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.models.families import FAMILIES, make_batch, make_model
from tests.properties import assert_near, assert_same_bits
from tests.tiny_models import llava, llava_batch
from torch_mdgd import MDGD, MDGDOptimizer, connector, freeze_all_but, last_decoder_layers, mdgd_backward
from torch_mdgd.models.parts import unwrap
from torch_mdgd.models.vision_cache import frozen_vision_parts, reuse_frozen_parts


def prepared(model):
    """Trains the connector and the last layer, as published; the weights have left the reference."""
    parameters = freeze_all_but(model, [connector(model), *last_decoder_layers(model, 1)])
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1))
    with torch.no_grad():
        for p in parameters:
            p.add_(0.01)
    return optimizer


def first_blocks_runs(model):
    """Counts how often the first frozen thing in the vision tower is computed."""
    runs = []
    part = frozen_vision_parts(model)[0]
    leaf = next(m for m in part.modules() if list(m.parameters(recurse=False)))
    original = leaf.forward

    def counted(*args, **kwargs):
        runs.append(None)
        return original(*args, **kwargs)

    leaf.forward = counted
    return runs


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_the_same_gradients_from_one_run_of_its_tower(name):
    outcomes, counts = [], []
    for reuse in (True, False):
        model = make_model(name)
        optimizer = prepared(model)
        runs = first_blocks_runs(model)
        mdgd_backward(model, optimizer, make_batch(name), reuse_vision=reuse)
        outcomes.append([p.grad for p in optimizer.parameters])
        assert any(x is not None and x.any() for x in outcomes[-1])
        counts.append(len(runs))
    assert counts[1] == 3 * counts[0] > 0
    assert_near(*outcomes)


def test_the_loss_of_routers_counts_those_of_frozen_layers_too():
    # Hooks of transformers inside of each layer collect what its router says.
    family = FAMILIES["qwen3_vl"].config
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    text = {**family["text_config"], **experts, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    config = AutoConfig.for_model("qwen3_vl_moe", **{**family, "text_config": text})
    model = AutoModelForImageTextToText.from_config(config)
    freeze_all_but(model, last_decoder_layers(model, 1))
    batch = make_batch("qwen3_vl")
    wanted = model(**batch)
    assert len(wanted.router_logits) == 3
    wanted.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained]
    model.zero_grad()
    optimizer = MDGDOptimizer(torch.optim.SGD(trained, lr=0.1), MDGD(regularize=0))
    loss = mdgd_backward(model, optimizer, batch)
    # At φ there is no visual gradient.
    assert_near([loss, *(p.grad for p in trained)], [wanted.loss.detach(), *gradients])


def test_another_batch_is_computed_anew():
    model = llava()
    model.requires_grad_(False)
    wanted = [model(**llava_batch(seed)).logits for seed in (1, 2)]
    with reuse_frozen_parts(model):
        for seed in (1, 1, 2, 1):
            assert_same_bits([model(**llava_batch(seed)).logits], [wanted[seed - 1]])


class Boxed(nn.Module):
    """Returns something that torch cannot look into."""

    def forward(self, x):
        return types.SimpleNamespace(features=x)


@pytest.mark.parametrize("change", ["dropout", "trained", "batch norm", "graph", "unknown output", "listener"])
def test_a_tower_that_is_more_than_a_function_of_its_inputs_is_run_every_time(change):
    tower = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).train()
    tower.requires_grad_(False)
    if change == "dropout":
        tower.append(nn.Dropout(0.5))
    if change == "batch norm":
        tower.append(nn.BatchNorm1d(4, affine=False))
    if change == "trained":
        tower.requires_grad_(True)
    model = nn.ModuleDict({"vision_tower": tower})
    if change == "unknown output":
        tower.append(Boxed())
    if change == "listener":
        tower[1].register_forward_hook(lambda *_: None)
    x = torch.randn(3, 4, requires_grad=change == "graph")
    runs = []
    original = tower[0].forward
    tower[0].forward = lambda x: runs.append(None) or original(x)
    with reuse_frozen_parts(model):
        for _ in range(2):
            model["vision_tower"](x)
    assert len(runs) == 2


def test_an_output_that_was_written_to_is_not_used_again():
    model = nn.ModuleDict({"visual": nn.Linear(4, 4)}).requires_grad_(False)
    x = torch.randn(3, 4)
    wanted = model["visual"](x)
    with reuse_frozen_parts(model):
        model["visual"](x).zero_()
        assert_same_bits([model["visual"](x)], [wanted])
        x.mul_(2)
        assert_same_bits([model["visual"](x)], [torch.nn.functional.linear(x, *model["visual"].parameters())])


def test_pictures_and_buffers_may_be_of_inference_mode():
    model = llava()
    optimizer = prepared(model)
    batch = llava_batch()
    mdgd_backward(model, optimizer, batch)
    wanted = [p.grad for p in optimizer.parameters]
    optimizer.zero_grad()
    with torch.inference_mode():
        batch["pixel_values"] = batch["pixel_values"].clone()
        for module in model.modules():
            module._buffers |= {key: x.clone() for key, x in module._buffers.items() if x is not None}
    mdgd_backward(model, optimizer, batch)
    assert_near([p.grad for p in optimizer.parameters], wanted)


def test_forward_is_restored_after_an_exception():
    model = llava().requires_grad_(False)
    tower = unwrap(model).model.vision_tower
    tower.forward = own = tower.forward
    with pytest.raises(AttributeError, match="shape"), reuse_frozen_parts(model):
        tower(pixel_values=1)
    assert vars(tower)["forward"] is own
    del tower.forward
    with pytest.raises(AttributeError, match="shape"), reuse_frozen_parts(model):
        tower(pixel_values=1)
    assert "forward" not in vars(tower)


def test_a_model_without_a_tower_is_left_alone():
    model = nn.Linear(2, 2)
    with reuse_frozen_parts(model):
        assert "forward" not in vars(model)

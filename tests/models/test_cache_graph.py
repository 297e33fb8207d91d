"""A remembered output is never handed to a pass that needs its graph, nor to one with other weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models.families import make_batch, make_model
from tests.properties import assert_near
from torch_mdgd import MDGD, MDGDOptimizer, Project, connector, freeze_all_but, last_decoder_layers, mdgd_backward
from torch_mdgd.models.families import TOWERS
from torch_mdgd.models.parts import unwrap
from torch_mdgd.models.vision_cache import frozen_vision_parts

FAMILIES = ["llava", "gemma3", "smolvlm", "internvl", "qwen2_5_vl"]
RULES = {"published": MDGD, "joint": lambda: MDGD(regularize=0), "project": Project}
# What the tower's attention is called where that is not what the decoder's is.
TARGETS = {"qwen2_5_vl": ["q_proj", "k_proj", "qkv"]}


def adapted(name):
    """LoRA on names that match the vision tower too."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(name), LoraConfig(r=2, target_modules=TARGETS.get(name, ["q_proj", "k_proj"])))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(std=0.05)
    return model


def with_first_block(name):
    """The connector, the last decoder layer and the tower's first block."""
    model = make_model(name)
    tower = next(m for key, m in model.named_modules() if key.rpartition(".")[2] in TOWERS)
    block = next(m for key, m in tower.named_modules() if key.endswith(".0"))
    freeze_all_but(model, [connector(model), *last_decoder_layers(model, 1), block])
    return model


MODELS = {"lora": adapted, "first block": with_first_block}


def in_tower(key):
    return any(word in key for word in ("vision", "visual"))


def steps(model, batch, reuse, rule, count=2):
    """Gradients of the last step, and the names in the tower of what has moved."""
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    start = {key: p.detach().clone() for key, p in trained.items()}
    optimizer = MDGDOptimizer(torch.optim.SGD(trained.values(), lr=0.05), rule())
    for _ in range(count):
        optimizer.zero_grad()
        mdgd_backward(model, optimizer, batch, reuse_vision=reuse)
        gradients = [p.grad for p in trained.values()]
        optimizer.step()
    moved = {key for key, p in trained.items() if in_tower(key) and not torch.equal(p, start[key])}
    return gradients, moved, {key for key in trained if in_tower(key)}


# The published rule has the most passes; which passes need a graph is of the rule, and no family knows of it.
@pytest.mark.parametrize(
    ("name", "kind", "rule"),
    [
        *((name, kind, "published") for name in FAMILIES for kind in MODELS),
        *(("llava", kind, rule) for kind in MODELS for rule in RULES if rule != "published"),
    ],
)
def test_a_remembered_output_is_not_handed_to_a_pass_that_needs_its_graph(name, kind, rule):
    (got, moved, trained), (wanted, _, _) = (
        steps(MODELS[kind](name), make_batch(name), reuse, RULES[rule]) for reuse in (True, False)
    )
    assert_near(got, wanted)
    assert trained
    # What is added to every key changes no attention, so that rounding alone moves it.
    assert {key for key in trained - moved if not key.endswith("k_proj.bias")} == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tower_that_was_trained_and_then_frozen_is_another_one_at_the_reference(name):
    outcomes = []
    for reuse in (True, False):
        model = with_first_block(name)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = MDGDOptimizer(torch.optim.SGD(trained, lr=0.05))
        for step in range(3):
            if step == 1:
                for key, p in model.named_parameters():
                    if in_tower(key) and "merger" not in key and "projector" not in key:
                        p.requires_grad_(False)
            optimizer.zero_grad()
            mdgd_backward(model, optimizer, make_batch(name), reuse_vision=reuse)
            outcomes.append([p.grad for p in trained])
            optimizer.step()
        exchanged = {id(p) for p in optimizer.trained}
        parts = frozen_vision_parts(unwrap(model), optimizer.trained)
        assert parts
        assert not any(id(p) in exchanged for part in parts for p in part.parameters())
    for got, wanted in zip(outcomes[:3], outcomes[3:], strict=True):
        assert_near(got, wanted)

"""Trainable parts by name, on every family of vision-language models."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.models.families import FAMILIES, make_batch, make_model, make_text_model
from torch_mdgd.models.parts import connector, freeze_all_but, last_decoder_layers, unwrap


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def names_of(model, parts):
    """The names in the model of all parameters of these modules."""
    wanted = {p for part in parts for p in part.parameters()}
    return [name for name, p in model.named_parameters() if p in wanted]


def test_parts_are_found_by_name(family):
    model = make_model(family)
    text = "model.text_model" if family in ("smolvlm", "idefics3") else "model.language_model"
    assert last_decoder_layers(model, 2) == [model.get_submodule(f"{text}.layers.{i}") for i in (1, 2)]
    expected = FAMILIES[family].connector
    assert names_of(model, [connector(model)]) == names_of(model, [model.get_submodule(name) for name in expected])
    assert names_of(model, [connector(model)])


def test_only_the_kept_parts_are_trained(family):
    model = make_model(family)
    kept = [*last_decoder_layers(model, 1), connector(model)]
    trainable = freeze_all_but(model, kept)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names_of(model, kept)
    assert len(trainable) == len(set(trainable)) == len(names_of(model, kept))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    model(**make_batch(family)).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(start[name], p)}
    assert moved <= set(names_of(model, kept))
    for part in kept:
        assert moved & set(names_of(model, [part]))


def test_inside_a_peft_model():
    model = make_model("llava")
    layers, bridge = last_decoder_layers(model, 2), connector(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    assert last_decoder_layers(wrapped, 2) == layers
    assert connector(wrapped) is bridge
    # Error messages name the user's model, not its wrapper.
    assert unwrap(wrapped) is model


def test_a_part_named_twice_is_trained_once():
    model = make_model("llava")
    layer = last_decoder_layers(model, 1)[0]
    assert freeze_all_but(model, [layer.mlp, layer, layer]) == list(layer.parameters())


@pytest.mark.parametrize("n", [0, -1, 4])
def test_a_wrong_number_of_layers_is_refused(n):
    with pytest.raises(ValueError, match=f"n must be between 1 and the decoder's 3 layers, got {n}"):
        last_decoder_layers(make_model("llava"), n)


def test_what_is_no_vision_language_model_is_refused():
    with pytest.raises(ValueError, match=r"no module of LlamaForCausalLM is called multi_modal_projector or connector"):
        connector(make_text_model())
    with pytest.raises(TypeError, match="Sequential is not a model of transformers"):
        last_decoder_layers(nn.Sequential(), 1)


@pytest.mark.parametrize(
    ("modules", "reason"),
    [([nn.Linear(2, 2)], "a Linear has parameters that the model does not hold"), ([], "hold no parameters")],
)
def test_refused_parts_leave_everything_as_it_was(modules, reason):
    model = make_model("llava")
    with pytest.raises(ValueError, match=reason):
        freeze_all_but(model, modules)
    assert all(p.requires_grad for p in model.parameters())

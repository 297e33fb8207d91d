"""Rules and masks as text."""

import pytest
import torch

from tests.tiny_models import llava
from torch_mdgd import MDGD, Anchor, DriftBudget, Magnitude, ProtectInputs, Random, StepProject, TopK
from torch_mdgd.integrations.written import ADVISED, written_mask, written_rule


@pytest.mark.parametrize(
    ("text", "kind", "weights"),
    [
        (ADVISED, MDGD, {"align": 3.0, "regularize": 0.0}),
        ("MDGD()", MDGD, {"align": 1.0, "regularize": 1.0}),
        (" MDGD(align=2, regularize=0, every=8) ", MDGD, {"align": 2.0, "regularize": 0.0}),
        ("StepProject(restore=0.1)", StepProject, {"restore": 0.1}),
        ("DriftBudget(MDGD(1.0, regularize=0), 0.05)", DriftBudget, {"align": 1.0, "regularize": 0.0}),
    ],
)
def test_a_rule_is_written_as_in_python(text, kind, weights):
    rule = written_rule(text)(llava())
    assert type(rule) is kind
    assert dict(rule.weights) == weights
    assert rule is not written_rule(text)(llava())


def test_all_arguments_arrive():
    assert written_rule("MDGD(2.0, regularize=0, every=8)")(llava()).every == 8
    assert written_rule("DriftBudget(MDGD(1.0, regularize=0), 0.05, measure_every=3)")(llava()).measure_every == 3


def test_rules_that_ask_for_the_model_get_it():
    model = llava()
    rule = written_rule("Anchor(strength=4.0, rank=None, tokens='image', rule=MDGD(3.0, regularize=0))")(model)
    assert (type(rule), rule.rank, rule.tokens) == (Anchor, None, "image")
    assert dict(rule.weights) == {"align": 3.0, "regularize": 0.0, "strength": 4.0}
    assert type(written_rule("ProtectInputs(energy=0.8)")(model)) is ProtectInputs
    assert type(written_rule("DriftBudget(Anchor(5.0, rule=MDGD(1.0, regularize=0)), 0.1)")(model)) is DriftBudget


@pytest.mark.parametrize(
    ("text", "kind"), [("TopK(0.1)", TopK), ("Random(0.1, seed=3)", Random), ("Magnitude(fraction=0.2)", Magnitude)]
)
def test_a_mask_is_written_as_in_python(text, kind):
    assert type(written_mask(text)) is kind


def test_a_written_mask_is_the_one_of_python():
    parameters = [torch.zeros(50, 4), torch.zeros(9)]
    for mine, wanted in zip(
        written_mask("Random(0.3, seed=3)").choose(parameters, None),
        Random(0.3, seed=3).choose(parameters, None),
        strict=True,
    ):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (written_rule, "mdgd", "'mdgd' is not a rule as written in Python.*Anchor, DriftBudget, MDGD"),
        (written_rule, "MDGD", "is not a rule"),
        (written_rule, "MDGD(", "is not a rule"),
        (written_rule, "", "is not a rule"),
        (written_rule, "Rule()", "is not a rule"),
        (written_rule, "TopK(0.1)", "is not a rule"),
        (written_rule, "MDGD(3.0, keep=1)", "MDGD.*'keep'"),
        (written_rule, "MDGD(1, 2, 3, 4)", "too many positional arguments"),
        (written_rule, "Anchor(rule=Random(0.1))", "is not a rule"),
        (written_rule, "__import__('os').getcwd()", "is not a rule"),
        (written_rule, "MDGD(align=__import__('os'))", "is not a rule"),
        (written_mask, "MDGD()", "is not a mask.*Given, Magnitude, Random, TopK"),
        (written_mask, "Random(0.1, part=2)", "Random.*'part'"),
    ],
)
def test_what_is_no_rule_or_mask_is_refused(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_a_value_out_of_range_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match="MDGD: align"):
        written_rule("MDGD(-1)")(llava())
    with pytest.raises(ValueError, match="fraction"):
        written_mask("Random(2.0)")

"""The ways whose costs are compared make the steps that their names say."""

from dataclasses import replace

import pytest
import torch

from benchmarks import costs
from benchmarks.costs import ALIGN, BARE, EVERY, LAST, LAZY, LORA_WAYS, LOW, PLAIN, TWO_PASSES, WAYS, WHOLE
from benchmarks.settings import QUICK
from tests.passes import counted
from tests.properties import assert_near
from torch_mdgd import Anchor, MDGDOptimizer

# Of four decoder layers two are frozen in the second set-up.
SETTINGS = replace(QUICK, layers=2)


def after(way, part, steps=3):
    training = costs.build(way, SETTINGS, part)
    torch.manual_seed(0)
    for _ in range(steps):
        training.step()
    return [p.detach() for p in training.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("part", [WHOLE, LAST])
def test_every_form_of_one_backward_pass_makes_the_same_steps(part):
    wanted = after(ALIGN, part)
    for way in WAYS:
        if way.name.startswith("αv, one"):
            assert_near(after(way, part), wanted)
    plain = after(PLAIN, part)
    assert not all(torch.equal(x, y) for x, y in zip(plain, wanted, strict=True))


@pytest.mark.parametrize("way", [*WAYS, *LORA_WAYS], ids=lambda way: way.name)
def test_every_way_makes_a_step(way):
    assert all(p.isfinite().all() for p in after(way, LAST, steps=1))


@pytest.mark.parametrize(("way", "forward"), [(TWO_PASSES, 2), (BARE, 2), (ALIGN, 1)])
def test_savings_are_there_or_not(way, forward):
    training = costs.build(way, SETTINGS, LAST)
    model = training.model
    tower, heads = counted(model.model.vision_tower.embeddings), counted(model.lm_head)
    training.step()
    assert len(tower) == forward
    assert len(heads) == forward


def test_each_round_has_plain_fine_tuning_beside_it():
    way = replace(LAZY, steps=4)
    times = costs.race([PLAIN, way], replace(SETTINGS, rounds=2), LAST)
    assert {name: len(values) for name, values in times[way.name].items()} == {PLAIN.name: 2, way.name: 2}
    assert list(times[PLAIN.name]) == [PLAIN.name]


def test_a_round_is_averaged_over_its_steps(monkeypatch):
    monkeypatch.setattr(type(SETTINGS), "race", lambda self, contenders: {one.name: [8.0] for one in contenders})
    way = replace(LAZY, steps=4)
    assert costs.race([way], SETTINGS, LAST) == {way.name: {PLAIN.name: [8.0], way.name: [2.0]}}


def test_what_is_adapted_has_lora_beside_it_too():
    way = LORA_WAYS[-1]
    times = costs.race([way], replace(SETTINGS, rounds=1), LAST)
    assert list(times[way.name]) == [PLAIN.name, LORA_WAYS[0].name, way.name]


def test_names_differ_and_rounds_are_whole():
    ways = [*WAYS, *LORA_WAYS]
    assert len({way.name for way in ways}) == len(ways)
    assert all(way.steps == EVERY for way in ways if "8th" in way.name)


def test_memory_is_that_of_the_parts():
    training = costs.build(LOW, SETTINGS, WHOLE)
    training.step()
    optimizer = training.optimizer
    assert isinstance(optimizer, MDGDOptimizer)
    assert isinstance(optimizer.rule, Anchor)
    rows = {id(m): m.sums.nbytes for m in optimizer.rule.covariances.moments.values()}
    found = costs.measure(LOW, SETTINGS, WHOLE)
    assert found.reference == sum(p.nbytes for p in optimizer.trained)
    assert found.state == pytest.approx(2 * found.reference, rel=0.01)
    # Scalars of each layer, and a place to begin for each width, come on top.
    assert sum(rows.values()) <= found.rule <= 2 * sum(rows.values())
    plain = costs.measure(PLAIN, SETTINGS, WHOLE)
    assert plain.rule == plain.reference == 0
    assert found.peak >= plain.peak + found.reference


def test_lora_trains_adapters_alone():
    pytest.importorskip("peft")
    training = costs.build(LORA_WAYS[-1], SETTINGS, LAST)
    names = [name for name, p in training.model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    training.step()

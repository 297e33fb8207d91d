"""State dicts: what is inside, that a resumed run is the uninterrupted one, and what is refused."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.properties import assert_same_bits, bits
from torch_mdgd import MDGD, MDGDOptimizer, Project, Random, StepProject, TopK
from torch_mdgd.rules.base import KINDS
from torch_mdgd.storage.entries import pack, unpack

FORMS = {
    "nothing captured": None,
    "published": {},
    "project": {"rule": Project()},
    "step": {"rule": StepProject(0.1)},
    "masked": {"mask": TopK(0.3)},
    "refreshed": {"mask": TopK(0.3, refresh=2)},
    "masked step": {"rule": StepProject(), "mask": TopK(0.3)},
    "compact": {"mask": TopK(0.3), "compact": True},
    "offload": {"offload": True},
    "compact step": {"rule": StepProject(0.1), "mask": TopK(0.3), "compact": True},
}
BASES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 3).bfloat16())


def build(model, base, form):
    optimizer = BASES[base](model.parameters())
    return MDGDOptimizer(optimizer, **(form or {})) if form is not None else MDGDOptimizer(optimizer)


def train(model, optimizer, steps, form):
    for step in steps:
        g = torch.Generator().manual_seed(step)
        kinds = {
            kind: [torch.randn(p.shape, generator=g).to(p.dtype) for p in model.parameters()] for kind in KINDS[:2]
        }
        if form is None:
            for p, x in zip(model.parameters(), kinds["task"], strict=True):
                p.grad = x
        else:
            if optimizer.needs() == KINDS:
                # Gradients that depend on the reference, so that a wrong one shows.
                with optimizer.reference():
                    at = [p.detach().clone() for p in model.parameters()]
                kinds |= {"reference_task": [x.sin() for x in at], "reference_visual": [x.square() for x in at]}
            optimizer.set_gradients(**kinds)
        optimizer.step()
        optimizer.zero_grad()


def through_disk(*objects):
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", FORMS)
def test_resumed_run_equals_the_uninterrupted_one(name, base):
    form = FORMS[name]
    whole = network()
    uninterrupted = build(whole, base, form)
    train(whole, uninterrupted, range(5), form)

    first = network()
    optimizer = build(first, base, form)
    train(first, optimizer, range(2), form)
    weights, state = through_disk(first.state_dict(), optimizer.state_dict())

    # Weights first: what is wrapped then is not the reference.
    second = network()
    second.load_state_dict(weights)
    resumed = build(second, base, form)
    resumed.load_state_dict(state_dict=state)
    train(second, resumed, range(2, 5), form)

    assert_same_bits(list(second.parameters()), list(whole.parameters()))
    with uninterrupted.reference(), resumed.reference():
        assert_same_bits(list(second.parameters()), list(whole.parameters()))


def test_reference_and_mask_travel_in_each_parameters_state():
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = build(model, "adamw", FORMS["masked"])
    train(model, optimizer, range(1), FORMS["masked"])
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert list(saved["state"]) == list(range(len(start)))
    entries = saved["state"].values()
    assert_same_bits([entry["mdgd_reference"] for entry in entries], start)
    assert all(entry["mdgd_mask"].dtype == torch.bool for entry in entries)
    assert all({"step", "exp_avg", "exp_avg_sq"} < set(entry) for entry in entries)


def test_saving_does_not_touch_the_wrapped_state():
    model = network()
    optimizer = build(model, "adamw", {})
    optimizer.state_dict()
    assert len(optimizer.state) == 0
    train(model, optimizer, range(1), None)
    optimizer.state_dict()
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in optimizer.state.values())


def test_a_checkpoint_from_before_the_first_step_can_be_stepped():
    model = network()
    optimizer = build(model, "adamw", {})
    other = network()
    fresh = build(other, "adamw", {})
    fresh.load_state_dict(*through_disk(optimizer.state_dict()))
    train(model, optimizer, range(2), {})
    train(other, fresh, range(2), {})
    assert_same_bits(list(other.parameters()), list(model.parameters()))


def test_loading_copies():
    model = network()
    optimizer = build(model, "adamw", FORMS["masked"])
    train(model, optimizer, range(1), FORMS["masked"])
    state = optimizer.state_dict()
    twin = network()
    loaded = build(twin, "adamw", FORMS["masked"])
    loaded.load_state_dict(state)
    kept = copy.deepcopy(loaded.state_dict())
    for entry in state["state"].values():
        entry["mdgd_reference"].zero_()
        entry["mdgd_mask"].zero_()
    for i, entry in loaded.state_dict()["state"].items():
        assert_same_bits([entry["mdgd_reference"]], [kept["state"][i]["mdgd_reference"]])
        assert torch.equal(entry["mdgd_mask"], kept["state"][i]["mdgd_mask"])


def test_loading_leaves_the_state_dict_as_it_was():
    model = network()
    optimizer = build(model, "adamw", {})
    train(model, optimizer, range(1), {})
    state = optimizer.state_dict()
    keys = {i: set(entry) for i, entry in state["state"].items()}
    groups = copy.deepcopy(state["param_groups"])
    build(network(), "adamw", {"rule": MDGD(0.5)}).load_state_dict(state)
    assert {i: set(entry) for i, entry in state["state"].items()} == keys
    assert state["param_groups"] == groups


def test_settings_in_the_groups_are_loaded():
    optimizer = build(network(), "sgd", {"rule": MDGD(0.25, 0.5)})
    other = build(network(), "sgd", {})
    other.load_state_dict(optimizer.state_dict())
    found = {key: value for key, value in other.param_groups[0].items() if key.startswith("mdgd_")}
    assert found == {"mdgd_rule": "MDGD", "mdgd_align": 0.25, "mdgd_regularize": 0.5}


def test_weights_of_another_rule_are_not_loaded():
    saved = build(network(), "sgd", {"rule": MDGD(0.25)}).state_dict()
    optimizer = build(network(), "sgd", {"rule": Project(0.75)})
    saved["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(saved)
    found = {key: value for key, value in optimizer.param_groups[0].items() if key.startswith("mdgd_")}
    assert found == {"mdgd_rule": "Project", "mdgd_align": 0.75}
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("compact", [False, True])
def test_a_state_dict_saved_before_a_mask_was_chosen_leaves_the_present_one(compact):
    p, twin = (nn.Parameter(torch.ones(100)) for _ in range(2))
    saved = MDGDOptimizer(torch.optim.AdamW([twin]), mask=TopK(0.1), compact=compact).state_dict()
    optimizer = MDGDOptimizer(torch.optim.AdamW([p], lr=0.01), mask=Random(0.1), compact=compact)
    optimizer.load_state_dict(saved)
    optimizer.set_gradients(task=[torch.ones(100)], visual=[None])
    optimizer.step()
    assert int((p != 1).sum()) == 10


def test_loading_discards_captures():
    model = network()
    optimizer = build(model, "sgd", {"rule": Project()})
    state = optimizer.state_dict()
    optimizer.set_gradients(task=[torch.ones_like(p) for p in model.parameters()])
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="task and visual gradients, not captured"):
        optimizer.combine()


def test_the_wrapped_optimizers_own_state_dict_works_with_a_warning():
    model = network()
    plain = torch.optim.AdamW(model.parameters(), lr=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    plain.step()
    other = network()
    start = [p.detach().clone() for p in other.parameters()]
    optimizer = build(other, "adamw", {"rule": MDGD(0.25)})
    state = plain.state_dict()
    with pytest.warns(UserWarning, match="holds no reference"):
        optimizer.load_state_dict(state)
    assert "mdgd_align" not in state["param_groups"][0]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["mdgd_align"] == 0.25
    assert float(optimizer.state[other[0].weight]["step"]) == 1
    with optimizer.reference():
        assert_same_bits(list(other.parameters()), start)


def broken(state, how):
    state = copy.deepcopy(state)
    if how == "fewer parameters":
        state["param_groups"][0]["params"].pop()
    elif how == "another shape":
        state["state"][2]["mdgd_reference"] = torch.ones(7)
    elif how == "a mask of another shape":
        state["state"][1]["mdgd_mask"] = torch.ones(7, dtype=torch.bool)
    elif how == "partly lost":
        del state["state"][3]["mdgd_reference"]
    elif how == "more groups":
        state["param_groups"].append({**state["param_groups"][0], "params": [state["param_groups"][0]["params"].pop()]})
    else:
        state["param_groups"][0]["mdgd_align"] = -1.0
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("fewer parameters", "is for 5 parameters, this optimizer has 6"),
        ("another shape", r"'mdgd_reference' of parameter 2 has shape \(7,\), needed is \(3, 5\)"),
        ("a mask of another shape", r"'mdgd_mask' of parameter 1 has shape \(7,\)"),
        ("partly lost", "'mdgd_reference' for some parameters but not for parameter 3"),
        ("more groups", "has 2 parameter groups, this optimizer 1"),
        ("a setting out of range", "mdgd_align must be a finite number"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(how, message):
    model = network()
    optimizer = build(model, "adamw", FORMS["masked"])
    train(model, optimizer, range(1), FORMS["masked"])
    before = copy.deepcopy(optimizer.state_dict())
    bad = broken(optimizer.state_dict(), how)
    for entry in bad["state"].values():
        entry["exp_avg"] = entry["exp_avg"] + 1
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, entry in before["state"].items():
        assert set(after["state"][i]) == set(entry)
        assert all(torch.equal(after["state"][i][k], x) for k, x in entry.items())


@pytest.mark.parametrize("name", ["masked", "compact"])
def test_groups_that_are_divided_otherwise_are_refused_and_change_nothing(name):
    form = FORMS[name]
    saved = []
    for first in (2, 4):
        model = network()
        parameters = list(model.parameters())
        base = torch.optim.AdamW([{"params": parameters[:first]}, {"params": parameters[first:]}], lr=0.02)
        optimizer = MDGDOptimizer(base, **form)
        train(model, optimizer, range(1), form)
        saved.append(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"hold \[2, 4\] parameters, those of this optimizer \[4, 2\]: build it with"):
        optimizer.load_state_dict(saved[0])
    train(model, optimizer, range(1, 3), form)
    resumed = network()
    parameters = list(resumed.parameters())
    other = MDGDOptimizer(torch.optim.AdamW([{"params": parameters[:4]}, {"params": parameters[4:]}], lr=0.02), **form)
    train(resumed, other, range(1), form)
    train(resumed, other, range(1, 3), form)
    assert_same_bits(list(model.parameters()), list(resumed.parameters()))


def test_a_mask_is_not_loaded_where_none_was_asked_for():
    model = network()
    optimizer = build(model, "adamw", FORMS["masked"])
    train(model, optimizer, range(1), FORMS["masked"])
    other = build(network(), "adamw", {})
    with pytest.raises(ValueError, match="saved with a mask: build the MDGDOptimizer with it, too"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_pack_and_unpack_are_opposites():
    model = network()
    parameters = list(model.parameters())
    plain = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    plain.step()
    reference = [p.detach() + 1 for p in parameters]
    masks = [p.detach() > 0 for p in parameters]
    packed = pack(plain.state_dict(), {"reference": reference, "mask": masks, "nothing": [None] * len(masks)})
    inner, found = unpack(packed, parameters)
    assert list(inner["state"]) == [0]
    assert set(found) == {"reference", "mask"}
    assert_same_bits(found["reference"], reference)
    assert_same_bits(found["mask"], masks)


# torch.distributed.checkpoint, in one process.


def dcp_round_trip(form):
    from torch.distributed.checkpoint import state_dict as dcp

    model = network()
    optimizer = build(model, "adamw", form)
    train(model, optimizer, range(2), form)
    (saved,) = through_disk(dcp.get_optimizer_state_dict(model, optimizer))
    twin = copy.deepcopy(model)
    loaded = build(twin, "adamw", form)
    dcp.set_optimizer_state_dict(twin, loaded, saved)
    return model, optimizer, twin, loaded


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["published", "masked", "step"])
def test_distributed_checkpoint_round_trip(name):
    form = FORMS[name]
    model, optimizer, twin, loaded = dcp_round_trip(form)
    for m, o in ((model, optimizer), (twin, loaded)):
        train(m, o, range(2, 4), form)
    assert_same_bits(list(twin.parameters()), list(model.parameters()))
    if name == "masked":
        first, second = (o.state_dict()["state"] for o in (optimizer, loaded))
        assert all(torch.equal(first[i]["mdgd_mask"], second[i]["mdgd_mask"]) for i in first)


@pytest.mark.parametrize("name", FORMS)
def test_the_first_step_of_distributed_checkpoint_does_nothing(name):
    from torch.distributed.checkpoint import state_dict as dcp

    model = network()
    optimizer = build(model, "adamw", FORMS[name])
    before = [bits(p).clone() for p in model.parameters()]
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(bits(p), x) for p, x in zip(model.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["lr"] == 0.02
    # dcp.load fills in what this state has, and nothing else: the mask needs its place before it is chosen.
    form = FORMS[name] or {}
    own = {"mdgd_positions"} if "compact" in form else {"mdgd_reference"} | ({"mdgd_mask"} if "mask" in form else set())
    own |= {"mdgd_mask_age"} if name == "refreshed" else set()
    assert set(saved["state"]["0.weight"]) == {"step", "exp_avg", "exp_avg_sq"} | own

"""The anchor: its pull is the float64 form's, of plain layers and of LoRA's, by each way to make C."""

import copy
import re
import warnings

import pytest
import torch
from peft import LoraConfig

from tests.properties import assert_same_bits
from tests.rules.anchored import adapted, batch, covariance, full, inputs_and_answers, move
from tests.tiny_models import IMAGE
from torch_mdgd import MDGD, Anchor, MDGDOptimizer, Random, mdgd_backward

pytestmark = pytest.mark.filterwarnings("ignore:Anchor holds linear layers", "ignore:parameter . has changed")
BATCHES = [batch(seed=s, labels=False) for s in range(3)]


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr)


def pull(optimizer, scale=1.0):
    """What the rule adds to a task gradient of zero."""
    zeros = [torch.zeros_like(p) for p in optimizer.parameters]
    with optimizer.capture("task", scale=scale):
        for p, x in zip(optimizer.parameters, zeros, strict=True):
            p.grad = x
    optimizer.combine()
    found = [p.grad.clone() for p in optimizer.parameters]
    optimizer.zero_grad()
    return found


def by_name(model, optimizer, found):
    places = {id(p): i for i, p in enumerate(optimizer.parameters)}
    return {name: found[places[id(p)]] for name, p in model.named_parameters() if id(p) in places}


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("relative", [True, False])
def test_the_pull_on_plain_layers(rank, relative):
    model, parameters = full()
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad]
    # Of several batches low-rank moments are approximate.
    batches = BATCHES if rank is None else BATCHES[:1]
    seen = {name: inputs_and_answers(model, name, batches) for name in names}
    anchor = Anchor(model, 0.3, rank=rank, relative=relative).calibrate(batches)
    optimizer = MDGDOptimizer(sgd(parameters), anchor)
    before = copy.deepcopy(dict(model.named_modules()))
    move(parameters)
    found = by_name(model, optimizer, pull(optimizer))
    assert len(names) == 9
    for name in names:
        now, then = dict(model.named_modules())[name], before[name]
        bias = now.bias is not None
        C = covariance(*seen[name], bias, rank, relative)
        D = now.weight - then.weight
        if bias:
            D = torch.cat([D, (now.bias - then.bias)[:, None]], 1)
        wanted = 0.3 * D @ C
        tolerance = 1e-9
        assert (found[f"{name}.weight"] - wanted[:, : now.weight.shape[1]]).norm() <= tolerance * wanted.norm()
        if bias:
            assert (found[f"{name}.bias"] - wanted[:, -1]).norm() <= tolerance * wanted.norm()
    norms = [x for name, x in found.items() if "norm" in name]
    assert len(norms) == 2
    assert not any(x.any() for x in norms)


@pytest.mark.parametrize("start", [True, "gaussian", "pissa"])
def test_the_pull_on_lora_is_the_gradient_of_the_layers_change(start):
    targets = r".*language_model.*(q_proj|up_proj)"
    config = LoraConfig(r=2, lora_alpha=4, use_rslora=True, target_modules=targets, init_lora_weights=start)
    model, parameters = adapted(config)
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}
    assert len(layers) == 4
    seen = {name: inputs_and_answers(model, name, BATCHES) for name in layers}
    anchor = Anchor(model, 0.3, rank=None, relative=False).calibrate(BATCHES)
    optimizer = MDGDOptimizer(sgd(parameters), anchor)
    phi = {name: m.get_delta_weight("default").detach().clone() for name, m in layers.items()}
    move(parameters)
    energy = torch.zeros((), dtype=torch.float64)
    for name, m in layers.items():
        D = m.scaling["default"] * m.lora_B.default.weight @ m.lora_A.default.weight - phi[name]
        energy = energy + 0.15 * (D @ covariance(*seen[name], False, None, False) * D).sum()
    wanted = torch.autograd.grad(energy, parameters)
    for x, y in zip(pull(optimizer), wanted, strict=True):
        assert (x - y).norm() <= 1e-10 * y.norm()


@pytest.mark.parametrize("first", ["lora_A", "lora_B"])
def test_loras_two_matrices_in_groups_of_their_own_are_one_layer(first):
    """As LoRA+ has them; the second group is there from the start, or added."""
    found = []
    for added in (False, True):
        model, _ = adapted()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [{"params": [p for name, p in named if (first in name) == own]} for own in (True, False)]
        optimizer = MDGDOptimizer(sgd(groups[:1] if added else groups), Anchor(model, 0.3).calibrate(BATCHES[:1]))
        if added:
            optimizer.add_param_group(groups[1])
        move([p for _, p in named])
        found.append(pull(optimizer))
    assert_same_bits(*found)
    assert all(x.any() for x in found[0])


@pytest.mark.parametrize("tokens", ["prompt", "image", "all"])
def test_which_tokens_count(tokens):
    model, parameters = full()
    name = "model.language_model.layers.1.mlp.down_proj"
    batches = [batch(seed=s) for s in range(2)]
    x, _ = inputs_and_answers(model, name, batches, tokens)
    anchor = Anchor(model, rank=None, tokens=tokens, relative=False)
    anchor.calibrate(batches, images=lambda b: b["input_ids"] == IMAGE)
    optimizer = MDGDOptimizer(sgd(parameters), anchor)
    key = next(layer.key for layer in anchor.layers if layer.name == name)
    assert optimizer.parameters[key] is dict(model.named_modules())[name].weight
    assert anchor.covariances.moments[key].size[1] == len(x)
    assert torch.allclose(anchor.covariances.moments[key].sums, x.T @ x, rtol=1e-12, atol=1e-12)


def test_without_calibration_the_first_steps_make_c_and_no_later_one():
    model, parameters = full()
    anchor = Anchor(model, 0.0, rank=None, warmup=2)
    optimizer = MDGDOptimizer(sgd(parameters, lr=0.0), anchor)
    for s in range(4):
        for i in range(2):
            mdgd_backward(model, optimizer, batch(seed=2 * s + i), weight=0.5, combine=i == 1)
        optimizer.step()
        optimizer.zero_grad()
    name = "model.language_model.layers.1.mlp.down_proj"
    x, _ = inputs_and_answers(model, name, [batch(seed=s) for s in range(4)])
    key = next(layer.key for layer in anchor.layers if layer.name == name)
    assert torch.allclose(anchor.covariances.moments[key].sums, x.T @ x, rtol=1e-12, atol=1e-12)


def test_layers_that_share_an_input_share_its_moments():
    model, parameters = full()
    anchor = Anchor(model).calibrate(BATCHES)
    MDGDOptimizer(sgd(parameters), anchor)
    held = {layer.name.rpartition(".")[2]: anchor.covariances.moments[layer.key] for layer in anchor.layers}
    assert held["q_proj"] is held["k_proj"] is held["v_proj"]
    assert held["gate_proj"] is held["up_proj"]
    assert held["q_proj"] is not held["o_proj"]


def memory(anchor):
    """Numbers in the storages under everything of matrix size that it holds."""
    held = [*anchor.covariances.moments.values(), *anchor.covariances._reduced.values()]
    found = [x for one in held for x in vars(one).values() if isinstance(x, torch.Tensor) and x.dim() == 2]
    return sum({x.data_ptr(): x.untyped_storage().nbytes() // x.element_size() for x in found}.values())


def test_what_is_held_is_two_ranks_of_rows_for_each_distinct_input():
    model, parameters = full()
    anchor = Anchor(model, 0.5, rank=2).calibrate(BATCHES)
    optimizer = MDGDOptimizer(sgd(parameters), anchor)
    widths = {id(anchor.covariances.moments[layer.key]): layer.width for layer in anchor.layers}
    for s in range(2):
        mdgd_backward(model, optimizer, batch(seed=s))
        optimizer.step()
        optimizer.zero_grad()
    assert len(anchor.covariances._reduced) == len(anchor.layers)
    assert memory(anchor) == 2 * 2 * sum(widths.values())
    # Layers that share their moments share them after a checkpoint too.
    again, others = full()
    resumed = Anchor(again, 0.5, rank=2)
    MDGDOptimizer(sgd(others), resumed).load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert memory(resumed) == memory(anchor)


def test_one_forward_and_one_backward_pass_and_no_pull_at_the_reference():
    model, parameters = full()
    twin = copy.deepcopy(model)
    optimizer = MDGDOptimizer(sgd(parameters), Anchor(model, 5.0).calibrate(BATCHES))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    mdgd_backward(model, optimizer, batch())
    assert len(calls) == 1
    twin(**batch()).loss.backward()
    own = [p for p in twin.parameters() if p.requires_grad]
    for p, q in zip(parameters, own, strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12, atol=1e-15)


def test_the_pull_carries_the_loss_scale_once():
    model, parameters = full()
    optimizer = MDGDOptimizer(sgd(parameters), Anchor(model, 0.3).calibrate(BATCHES))
    move(parameters)
    for x, y in zip(pull(optimizer), pull(optimizer, scale=1024.0), strict=True):
        assert_same_bits([x * 1024], [y])


def test_every_second_step_twice_as_strong():
    model, parameters = full()
    optimizer = MDGDOptimizer(sgd(parameters), Anchor(model, 0.25, every=2).calibrate(BATCHES))
    each = MDGDOptimizer(sgd(parameters), Anchor(model, 0.5).calibrate(BATCHES))
    move(parameters)
    assert not any(x.any() for x in pull(optimizer))
    each.set_reference([p - m for p, m in zip(parameters, moved(parameters), strict=True)])
    assert any(x.any() for x in pull(optimizer))


def moved(parameters):
    generator = torch.Generator().manual_seed(3)
    return [0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]


@pytest.mark.parametrize("compact", [False, True])
def test_inside_a_mask_alone(compact):
    model, parameters = full()
    start = [p.detach().clone() for p in parameters]
    anchor = Anchor(model, 0.3).calibrate(BATCHES)
    optimizer = MDGDOptimizer(sgd(parameters), anchor, mask=Random(0.3), compact=compact)
    for s in range(3):
        mdgd_backward(model, optimizer, batch(seed=s))
        optimizer.step()
        optimizer.zero_grad()
    masks = Random(0.3).choose(parameters, None)
    for p, x, mask in zip(parameters, start, masks, strict=True):
        assert_same_bits([p[~mask]], [x[~mask]])
    assert any((p != x).any() for p, x in zip(parameters, start, strict=True))


def test_dense_and_compact_agree():
    ends = []
    for compact in (False, True):
        model, parameters = full()
        base = torch.optim.AdamW(parameters, lr=1e-2)
        optimizer = MDGDOptimizer(base, Anchor(model, 3.0).calibrate(BATCHES), mask=Random(0.3), compact=compact)
        for s in range(4):
            mdgd_backward(model, optimizer, batch(seed=s))
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in parameters])
    for x, y in zip(*ends, strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-12)


def half_frozen():
    """LoRA whose A is frozen and the optimizer's all the same."""
    model, parameters = adapted()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    return model, parameters


@pytest.mark.parametrize(("make", "when"), [(full, 1), (full, 3), (adapted, 1), (adapted, 3), (half_frozen, 3)])
def test_a_resumed_run_is_the_uninterrupted_one(make, when):
    """Saved while C is being made, and after."""

    def build():
        model, parameters = make()
        rule = Anchor(model, 2.0, rank=2, warmup=2, every=2, rule=MDGD(0.5, 0, every=2))
        return model, parameters, MDGDOptimizer(torch.optim.AdamW(parameters, lr=1e-2), rule)

    def train(model, optimizer, steps):
        for s in steps:
            mdgd_backward(model, optimizer, batch(seed=s))
            optimizer.step()
            optimizer.zero_grad()

    model, parameters, optimizer = build()
    train(model, optimizer, range(when))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(when, 6))
    other, again, resumed = build()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, range(when, 6))
    assert_same_bits(again, parameters)


def test_what_it_was_calibrated_with_stays_if_a_state_dict_or_a_second_calibration_has_none():
    model, parameters = full()
    optimizer = MDGDOptimizer(sgd(parameters), Anchor(model).calibrate(BATCHES))
    move(parameters)
    before = pull(optimizer)
    with pytest.warns(UserWarning, match="holds no reference"):
        optimizer.load_state_dict(sgd(parameters).state_dict())
    with pytest.raises(ValueError, match="batches is empty"):
        optimizer.rule.calibrate([])
    assert any(x.any() for x in before)
    assert_same_bits(pull(optimizer), before)


@pytest.mark.parametrize("make", [full, adapted])
@pytest.mark.parametrize("rank", [None, 3])
def test_as_a_plain_loss_it_has_the_same_gradient(make, rank):
    model, parameters = make()
    plain = Anchor(model, 0.3, rank=rank).hold().calibrate(BATCHES)
    optimizer = MDGDOptimizer(sgd(parameters), Anchor(model, 0.3, rank=rank).calibrate(BATCHES))
    assert plain.loss() == 0
    move(parameters)
    wanted = torch.autograd.grad(plain.loss(), parameters, allow_unused=True)
    for x, y in zip(pull(optimizer), wanted, strict=True):
        assert (x - (torch.zeros_like(x) if y is None else y)).norm() <= 1e-6 * x.norm()


def test_what_is_not_held_is_named_once():
    model, parameters = full()
    anchor = Anchor(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        MDGDOptimizer(sgd(parameters), anchor)
    (message,) = [str(w.message) for w in seen]
    assert "layers.1.input_layernorm.weight" in message
    assert "post_attention_layernorm.weight" in message


class Attention(torch.nn.Module):
    """Holds a layer whose weight it takes, but which it never calls."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(4, 4)
        self.attention = torch.nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, input_ids):
        x = torch.nn.functional.one_hot(input_ids, 4).float()
        return self.attention(*[self.proj(x)] * 3)[0]


NEVER_RUN = r"has run these layers as modules.* trained freely: attention\.out_proj$"


def test_layers_that_no_calibration_runs_are_named():
    anchor = Anchor(model := Attention(), text_module=model)
    MDGDOptimizer(sgd(model.parameters()), anchor)
    with pytest.warns(UserWarning, match=NEVER_RUN):
        anchor.calibrate([{"input_ids": torch.tensor([[1, 2, 3]])}])


def test_layers_that_no_first_step_runs_are_named_once_when_c_is_made():
    anchor = Anchor(model := Attention(), text_module=model, warmup=2)
    optimizer = MDGDOptimizer(sgd(model.parameters()), anchor)
    ids = torch.tensor([[1, 2, 3]])
    seen = []
    for _ in range(4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with anchor.observe(torch.zeros_like(ids, dtype=torch.bool), {"input_ids": ids}), optimizer.capture("task"):
                model(ids).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        seen.append([str(one.message) for one in caught])
    assert [len(messages) for messages in seen] == [0, 1, 0, 0]
    assert re.search(NEVER_RUN, seen[1][0])


def test_a_connector_is_named_if_no_calibration_has_pictures():
    model, parameters = full()
    anchor = Anchor(model)
    MDGDOptimizer(sgd(parameters), anchor)
    ids = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.warns(UserWarning, match=r"projector\.linear_1, model\.multi_modal_projector\.linear_2$"):
        anchor.calibrate([ids])


def test_dora_is_refused_by_name():
    model, parameters = adapted(LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: DoRA"):
        MDGDOptimizer(sgd(parameters), Anchor(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "Anchor: strength must be a finite number ≥ 0"),
        ({"rank": 0}, "Anchor: rank must be a whole number of at least 1"),
        ({"tokens": "answers"}, "Anchor: tokens must be"),
        ({"warmup": 0}, "Anchor: warmup"),
        ({"every": 0}, "Anchor: every"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    model, _ = full()
    with pytest.raises(ValueError, match=message):
        Anchor(model, **arguments)


def test_misuse():
    model, parameters = full()
    anchor = Anchor(model)
    MDGDOptimizer(sgd(parameters), anchor)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        MDGDOptimizer(sgd(parameters), anchor)
    with pytest.raises(ValueError, match=r"calibrate: tokens='image' needs images"):
        Anchor(model, tokens="image").calibrate(BATCHES)
    with pytest.raises(ValueError, match="batches is empty"):
        anchor.calibrate([])
    with pytest.raises(RuntimeError, match="hold"):
        anchor.loss()
    embedding = [model.model.language_model.embed_tokens.weight.requires_grad_()]
    with pytest.raises(ValueError, match="holds no linear layer"):
        MDGDOptimizer(sgd(embedding), Anchor(model))
    with pytest.raises(TypeError, match="rule must be a Rule"):
        Anchor(model, rule="MDGD")

"""Capturing gradients: what is taken, what is refused, and what an error leaves behind."""

import warnings

import pytest
import torch
from torch import nn

from tests.networks import capture_both, losses, network
from tests.properties import assert_close, assert_same_bits, expected
from tests.strategies import make_case
from torch_mdgd import MDGDOptimizer, Project
from torch_mdgd.captures import Step

F64 = (torch.float64,)
TWO = {"rule": Project()}


def sgd(model: nn.Module, **settings) -> MDGDOptimizer:
    return MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **settings)


def gradients(model: nn.Module, which: int):
    return list(torch.autograd.grad(losses(model)[which], list(model.parameters()), allow_unused=True))


def grads(model: nn.Module):
    return [p.grad for p in model.parameters()]


def test_captured_passes_equal_gradients_given():
    model = network()
    optimizer = sgd(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    at_reference = network()
    kinds = [gradients(m, which) for m in (model, at_reference) for which in (1, 0)]
    with optimizer.reference():
        capture_both(model, optimizer)
    capture_both(model, optimizer)
    optimizer.combine()
    assert_close(grads(model), expected(kinds, list(model.parameters())))


def test_capture_leaves_no_gradient_behind():
    model = network()
    optimizer = sgd(model)
    capture_both(model, optimizer)
    assert all(g is None for g in grads(model))


def test_micro_batches_add_up_to_the_full_batch():
    data = torch.linspace(-2, 2, 32, dtype=torch.float64).view(8, 4)
    outcomes = []
    for parts in (1, 4):
        model = network()
        optimizer = sgd(model, **TWO)
        for x in data.chunk(parts):
            with optimizer.capture("task"):
                (model(x) - 1).square().sum().backward()
            with optimizer.capture("visual"):
                model[0](x).square().sum().backward()
        optimizer.combine()
        outcomes.append(grads(model))
    assert_close(outcomes[1], outcomes[0])


def test_set_gradients_adds_up_and_copies():
    case = make_case([(2, 3)], F64, 0)
    (p,) = case.parameters
    g, v = case.gradients["task"][0], case.gradients["visual"][0]
    kept = g.clone()
    optimizer = MDGDOptimizer(torch.optim.SGD([p], lr=1.0), **TWO)
    optimizer.set_gradients(task=[g], visual=[v])
    optimizer.set_gradients(task=[None], visual=[v])
    optimizer.set_gradients(task=[g])
    optimizer.combine()
    assert_close([p.grad], expected([[2 * g], [2 * v], [None], [None]], [p], rule="Project"))
    assert_same_bits([g], [kept])


def test_set_gradients_adds_to_captures():
    model = network()
    optimizer = sgd(model, **TWO)
    task, visual = gradients(model, 1), gradients(model, 0)
    capture_both(model, optimizer)
    optimizer.set_gradients(task=task, visual=visual)
    optimizer.combine()
    double = [[None if x is None else 2 * x for x in kind] for kind in (task, visual)]
    nothing = [None] * len(task)
    assert_close(grads(model), expected([*double, nothing, nothing], list(model.parameters()), rule="Project"))


def test_nested_capture_is_refused_and_discards():
    model = network()
    optimizer = sgd(model, **TWO)
    outer, inner = optimizer.capture("task"), optimizer.capture("visual")
    with pytest.raises(RuntimeError, match="already inside another capture"), outer, inner:
        pass
    with pytest.raises(RuntimeError, match="not captured"):
        optimizer.combine()
    capture_both(model, optimizer)
    optimizer.step()


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'reference_task'"):
        sgd(network()).capture("reference_task")


def test_exception_inside_capture_discards_the_step():
    model = network()
    optimizer = sgd(model, **TWO)

    def fails():
        with optimizer.capture("task"):
            task.backward()
            raise ZeroDivisionError

    visual, task = losses(model)
    with optimizer.capture("visual"):
        visual.backward(retain_graph=True)
    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(g is None for g in grads(model))
    with pytest.raises(RuntimeError, match="task and visual gradients, not captured"):
        optimizer.combine()


def test_capture_without_any_gradient_is_refused():
    model = network()
    optimizer = sgd(model)
    empty = optimizer.capture("task")
    with pytest.raises(RuntimeError, match="capture of task: no parameter received a gradient"), empty:
        pass


@pytest.mark.parametrize("verb", ["combine", "step"])
def test_a_group_without_any_gradient_is_warned_of(verb):
    # Reentrant checkpointing drops the gradients of what it runs where no input requires any.
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = MDGDOptimizer(torch.optim.SGD(groups, lr=0.1), **TWO)
    nothing, ones = [None, None], [torch.ones_like(p) for p in model[2].parameters()]
    optimizer.set_gradients(task=[*nothing, *ones], visual=[*nothing, *ones])
    with pytest.warns(
        UserWarning, match=r"no parameter of group 0 received a gradient of any kind.*use_reentrant=False"
    ):
        getattr(optimizer, verb)()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # One that is frozen, one that some kind reaches, and a step without pictures.
        optimizer.set_gradients(task=[*nothing, *ones], visual=[None] * 4)
        getattr(optimizer, verb)()
        optimizer.zero_grad()
        optimizer.set_gradients(task=[torch.ones_like(model[0].weight), None, *ones], visual=[*nothing, *ones])
        getattr(optimizer, verb)()
        optimizer.zero_grad()
        model[0].requires_grad_(False)
        optimizer.set_gradients(task=[*nothing, *ones], visual=[*nothing, *ones])
        getattr(optimizer, verb)()


def test_stray_gradient_before_the_first_capture_is_refused():
    model = network()
    optimizer = sgd(model)
    losses(model)[1].backward()
    with pytest.raises(RuntimeError, match="parameter 0 already has a gradient"), optimizer.capture("visual"):
        pass
    with pytest.raises(RuntimeError, match="parameter 0 already has a gradient"):
        optimizer.set_gradients(task=gradients(model, 1))


def test_stray_gradient_between_captures_is_refused():
    model = network()
    optimizer = sgd(model, **TWO)
    visual, task = losses(model)
    with optimizer.capture("visual"):
        visual.backward(retain_graph=True)
    task.backward()
    with pytest.raises(RuntimeError, match="parameter 0 already has a gradient"), optimizer.capture("task"):
        pass


@pytest.mark.parametrize("verb", ["combine", "step"])
def test_stray_gradient_after_the_captures_is_refused(verb):
    model = network()
    optimizer = sgd(model, **TWO)
    capture_both(model, optimizer)
    losses(model)[1].backward()
    with pytest.raises(RuntimeError, match="parameter 0 already has a gradient"):
        getattr(optimizer, verb)()


def test_zeroed_gradients_are_not_stray():
    model = network()
    optimizer = sgd(model, **TWO)
    for _ in range(2):
        capture_both(model, optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads(model))


def test_forgotten_zero_grad_is_refused():
    model = network()
    optimizer = sgd(model, **TWO)
    capture_both(model, optimizer)
    optimizer.step()
    with pytest.raises(RuntimeError, match="zero_grad"):
        capture_both(model, optimizer)


def test_sparse_gradient_is_refused_by_position():
    table = nn.Embedding(5, 2, sparse=True)
    dense = nn.Parameter(torch.ones(2))
    optimizer = MDGDOptimizer(torch.optim.SGD([dense, table.weight], lr=0.1))
    with pytest.raises(ValueError, match="task gradient of parameter 1 is sparse"), optimizer.capture("task"):
        (table(torch.tensor([1, 3])) * dense).sum().backward()


def test_complex_gradient_is_refused_by_position():
    optimizer = MDGDOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1))
    with pytest.raises(ValueError, match="visual gradient of parameter 0 is complex"):
        optimizer.set_gradients(visual=[torch.ones(2, dtype=torch.complex64)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.ones(3)], "reference_task gradients: 1 entries for 2 parameters"),
        (
            [torch.ones(3), torch.ones(3)],
            r"reference_task gradient of parameter 1 has shape \(3,\), the parameter \(2,\)",
        ),
    ],
)
def test_set_gradients_checks_sizes_and_takes_all_or_nothing(given, message):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = MDGDOptimizer(torch.optim.SGD(parameters, lr=0.1))
    good = [torch.ones(3), torch.ones(2)]
    with pytest.raises(ValueError, match=message):
        optimizer.set_gradients(task=good, visual=good, reference_task=given, reference_visual=good)
    with pytest.raises(RuntimeError, match="needs the task and visual and reference_task and reference_visual"):
        optimizer.combine()


def test_loss_scales_must_agree_within_a_step():
    model = network()
    optimizer = sgd(model, **TWO)
    visual, task = losses(model)
    with optimizer.capture("visual", scale=1024.0):
        (1024 * visual).backward(retain_graph=True)
    unscaled = optimizer.capture("task")
    with pytest.raises(ValueError, match=r"capture of task: loss scale 1\.0 differs from 1024\.0"), unscaled:
        task.backward()
    with optimizer.capture("task", scale=1024.0):
        (1024 * task).backward()
    optimizer.step()
    optimizer.zero_grad()
    # The next step is free to have another.
    capture_both(model, optimizer, scale=512.0)


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model = Tied().double()
    optimizer = sgd(model, **TWO)
    assert len(optimizer.parameters) == 1
    tokens = torch.tensor([0, 2, 5])
    task, visual = lambda: model(tokens).logsumexp(1).sum(), lambda: model.embed(tokens).sin().sum()
    g, v = (torch.autograd.grad(f(), [model.embed.weight])[0] for f in (task, visual))
    start = model.embed.weight.detach().clone()
    with torch.no_grad():
        model.embed.weight.add_(0.5)
    with optimizer.reference():
        assert_same_bits([model.head.weight], [start])
        with optimizer.capture("visual"):
            visual().backward()
        with optimizer.capture("task"):
            task().backward()
    with torch.no_grad():
        model.embed.weight.sub_(0.5)
    for kind, f in (("visual", visual), ("task", task)):
        with optimizer.capture(kind):
            f().backward()
    optimizer.combine()
    assert_close([model.embed.weight.grad], expected([[g], [v], [g], [v]], [model.embed.weight], rule="Project"))


def test_what_was_not_measured_is_no_number():
    g = [torch.tensor([3.0, 4.0]), None]
    step = Step(task=g, visual=[None] * 2, reference=[None] * 2, gradients=[g], d=g, scale=1.0)
    assert step.products(measured=True).flatten().tolist() == [25, 0]
    assert step.products(measured=False).isnan().all()

"""A delta fits the base model whatever is around either of the two."""

import copy
import socket

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.properties import assert_same_bits
from torch_mdgd import MDGDOptimizer, Project
from torch_mdgd.delta import apply_delta, fingerprint, save_delta
from torch_mdgd.delta.names import parameters_of


class Block(nn.Module):
    """With a part that has the name of what DistributedDataParallel puts in front."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        self.head.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.head(self.norm(self.module(x))) * self.head.scale


@pytest.fixture(scope="module")
def one_process():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def inner_compiled(model):
    model.module = compiled(model.module)
    return model


AROUND = {
    "nothing": lambda model: model,
    "compile": compiled,
    "compile of a part": inner_compiled,
    "DistributedDataParallel": DistributedDataParallel,
    "compile of DistributedDataParallel": lambda model: compiled(DistributedDataParallel(model)),
    "DistributedDataParallel of compile": lambda model: DistributedDataParallel(compiled(model)),
    "DataParallel": nn.DataParallel,
    "another wrapper's": lambda model: nn.ModuleDict({"model": model})["model"],
}


def test_parts_of_such_names_keep_them():
    model = Block()
    assert list(parameters_of(model)) == [name for name, _ in model.named_parameters()]


def tune(model, optimizer):
    with optimizer.capture("task"):
        model(torch.randn(6, 4, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    optimizer.set_gradients(visual=[None] * len(optimizer.parameters))
    optimizer.step()
    optimizer.zero_grad()


def plain(model):
    """Parameters and buffers in order; names aside."""
    return [*model.parameters(), *model.buffers()]


# What is in a file knows nothing of what was around the model.
@pytest.mark.parametrize(
    ("source", "target"),
    [
        *((source, "nothing") for source in AROUND),
        *(("nothing", target) for target in AROUND if target != "nothing"),
        ("DistributedDataParallel of compile", "compile of DistributedDataParallel"),
    ],
)
def test_saved_from_one_and_applied_to_another(one_process, tmp_path, source, target):
    base = Block()
    model = AROUND[source](copy.deepcopy(base))
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), Project())
    tune(model, optimizer)
    assert save_delta(model, tmp_path / "d", optimizer) > 0
    other = AROUND[target](copy.deepcopy(base))
    assert fingerprint(other) == fingerprint(base)
    applied = apply_delta(other, tmp_path / "d")
    assert_same_bits(plain(other), plain(model))
    applied.undo()
    assert_same_bits(plain(other), plain(base))


def test_prepared_by_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    base = Block()
    model = copy.deepcopy(base)
    wrapped = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), Project())
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, wrapped)
    tune(model, wrapped)
    save_delta(model, tmp_path / "d", optimizer)
    apply_delta(base, tmp_path / "d")
    assert_same_bits(plain(base), plain(model))


def test_with_activation_checkpointing(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    base = Block()
    model = copy.deepcopy(base)
    model.head = checkpoint_wrapper(model.head)
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), Project())
    tune(model, optimizer)
    save_delta(model, tmp_path / "d", optimizer)
    apply_delta(base, tmp_path / "d")
    assert_same_bits(plain(base), plain(model))


def test_a_tied_parameter_stands_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inputs, self.outputs = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.outputs.weight = self.inputs.weight

    model = Tied()
    base, untied = copy.deepcopy(model), copy.deepcopy(model)
    untied.outputs.weight = nn.Parameter(untied.inputs.weight.detach().clone())
    optimizer = MDGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), Project())
    optimizer.set_gradients(task=[torch.ones(5, 3)], visual=[None])
    optimizer.step()
    assert save_delta(model, tmp_path / "d", optimizer) == 15
    apply_delta(base, tmp_path / "d")
    assert base.outputs.weight is base.inputs.weight
    assert_same_bits([base.outputs.weight], [model.inputs.weight])
    with pytest.raises(ValueError, match=r"its parameter 'outputs\.weight' is not there"):
        apply_delta(untied, tmp_path / "d")

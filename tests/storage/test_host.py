"""φ in the host's memory: the same steps, and where everything lies, told by tensors of a GPU that hold no numbers."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.networks import network, train_step
from tests.storage.test_checkpoint import through_disk
from torch_mdgd import MDGDOptimizer, Random
from torch_mdgd.storage.host import HostStorage


def test_steps_are_those_of_a_reference_beside_the_parameters():
    outcomes = []
    for before, after in ((False, False), (True, False), (False, True)):
        model = network()
        optimizer = MDGDOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), offload=before)
        for number in range(2):
            train_step(model, optimizer, number)
        saved = through_disk(optimizer.state_dict())[0]
        optimizer = MDGDOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), offload=after)
        optimizer.load_state_dict(saved)
        for number in range(2, 4):
            train_step(model, optimizer, number)
        outcomes.append([p.detach().clone() for p in model.parameters()])
    assert not torch.allclose(outcomes[0][0], network()[0].weight)
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0])


def test_parameters_stay_on_their_gpu_and_the_reference_on_the_host():
    with FakeTensorMode():
        parameters = [nn.Parameter(torch.zeros(700, 500, device=device)) for device in ("cuda", "cpu")]
        storage = HostStorage(parameters)

        def there():
            held = [x.device.type for x in storage.reference]
            return held == ["cpu", "cpu"] and [p.device.type for p in parameters] == ["cuda", "cpu"]

        assert there()
        storage.follow(parameters)
        assert there()
        assert [storage.difference(parameters, t).device.type for t in range(2)] == ["cuda", "cpu"]
        storage.renew(parameters, [p.detach() for p in parameters])
        assert there()


def test_a_model_that_is_moved_after_it_was_wrapped_leaves_it_where_it_is():
    layer = nn.Linear(3, 3)
    optimizer = MDGDOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), mask=Random(0.5), offload=True)
    optimizer.param_groups[0]["params"] = list(nn.Linear(3, 3, device="meta").parameters())
    optimizer._storage.follow(optimizer.parameters)
    assert {x.device.type for x in optimizer._storage.reference} == {"cpu"}
    assert {x.device.type for x in optimizer._storage.masks} == {"meta"}


def test_what_it_does_not_go_with_is_refused():
    base = torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="leave out offload=True"):
        MDGDOptimizer(base, mask=Random(0.5), compact=True, offload=True)
    with pytest.raises(TypeError, match="offload must be True or False, got 'cpu'"):
        MDGDOptimizer(base, offload="cpu")

"""Two processes are expensive to start: one pair goes through the cases of all files here."""

import pytest
import torch.distributed.checkpoint as dcp

from tests.distributed import checkpoints, pair, rules, setups, workers


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="session")
def alone(folder):
    """What one process finds in the cases of rules that look at features or inputs."""
    return rules.alone(folder)


@pytest.fixture(scope="session")
def ranks(folder, alone):
    """What each of two processes found, by case."""
    for form in workers.CHECKPOINTED:
        net, optimizer = workers.build(form, "alone")
        list(setups.train(net, optimizer, 0, 1, range(2)))
        dcp.save(checkpoints.state(net, optimizer), checkpoint_id=folder / f"one {form}")
    return pair.outcomes(workers.run, folder)


@pytest.fixture
def found(ranks):
    """What the ranks found in a case."""

    def of(name):
        outcomes = [rank[name] for rank in ranks]
        for outcome in outcomes:
            assert not isinstance(outcome, str) or "Traceback" not in outcome, outcome
        return outcomes

    return of

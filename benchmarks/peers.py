"""Other people's implementations, each used as its documentation says. All are optional: the ``bench`` extra."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """One rival of the update: takes the Jacobian, shape (rows, n), and returns a new update, shape (n,).

    Args:
        name: as printed.
        package: the module to import.
        distribution: what pip calls it.
        build: imports it and returns the function.
    """

    name: str
    package: str
    distribution: str
    build: Callable[[], Callable[[Tensor], Tensor]]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def _torchjd_pcgrad() -> Callable[[Tensor], Tensor]:
    from torchjd.aggregation import PCGrad

    return PCGrad()


def _torchjd_upgrad() -> Callable[[Tensor], Tensor]:
    from torchjd.aggregation import UPGrad

    return UPGrad()


def _config() -> Callable[[Tensor], Tensor]:
    from conflictfree.grad_operator import ConFIG_update

    return ConFIG_update


def _pytorch_optimizer_pcgrad() -> Callable[[Tensor], Tensor]:
    import torch
    from pytorch_optimizer import PCGrad

    pcgrad = PCGrad(torch.optim.SGD([torch.zeros(1, requires_grad=True)]))

    def run(jacobian: Tensor) -> Tensor:
        # As its pc_backward leaves them; ones mark that every gradient exists.
        has_grads = [torch.ones_like(row) for row in jacobian]
        return pcgrad.project_conflicting(list(jacobian), has_grads)

    return run


TORCHJD_PCGRAD = Peer("torchjd PCGrad", "torchjd", "torchjd", _torchjd_pcgrad)
PEERS = (
    TORCHJD_PCGRAD,
    Peer("torchjd UPGrad", "torchjd", "torchjd", _torchjd_upgrad),
    Peer("pytorch-optimizer PCGrad", "pytorch_optimizer", "pytorch-optimizer", _pytorch_optimizer_pcgrad),
    Peer("conflictfree ConFIG", "conflictfree", "conflictfree", _config),
)
DISTRIBUTIONS = {"peft": "peft", **{peer.package: peer.distribution for peer in PEERS}}


def versions() -> dict[str, str]:
    """The installed version of each peer's distribution, or "not installed"."""
    return {
        distribution: version(distribution) if importlib.util.find_spec(package) else "not installed"
        for package, distribution in DISTRIBUTIONS.items()
    }

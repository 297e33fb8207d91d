"""The visual drift as what step space takes out of moves: the directions are the visual gradients of the steps."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from torch_mdgd import settings
from torch_mdgd.decoupling import Decouple, decouple_moves_
from torch_mdgd.kernels import Role
from torch_mdgd.settings import Group


class VisualDrift:
    """Removes from each move what raises the visual loss at the place where it began."""

    def of_step(self, directions: Role | None, groups: Sequence[Group]) -> Decouple | None:
        """See :class:`torch_mdgd.decoupling.Decoupling`, here and below."""
        return None if directions is None else partial(self._decouple_, v=directions, groups=groups)

    def _decouple_(
        self, parameters: Sequence[Tensor], before: Sequence[Tensor], v: Role, groups: Sequence[Group]
    ) -> None:
        decouple_moves_(parameters, before, v, settings.together(groups, "step"), settings.restores(groups))

    def begin(self) -> None:
        """Nothing is remembered."""

    def extend(self, group: Group) -> None:
        """Nothing is remembered."""

    def save(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Nothing is remembered."""
        return state_dict

    def check(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Nothing is remembered."""

    def load(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Nothing is remembered."""

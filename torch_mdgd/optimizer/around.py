"""An optimizer around an optimizer: which ones can be wrapped, and what of them shows through."""

from functools import partial
from typing import Any

from torch.optim import LBFGS, Optimizer

from torch_mdgd.optimizer.groups import Group
from torch_mdgd.parallel import ranks


class Around(Optimizer):
    """The base of :class:`MDGDOptimizer`: its groups, state and defaults are those of another optimizer, ``base``.

    Nothing of them is cached: loading a state dict rebuilds the groups, and sharding replaces the parameters in them.
    Nothing else shows through: a fused base claims to unscale gradients by itself, and a gradient scaler that believes
    this of the wrapper applies steps a thousand times too large.
    """

    base: Optimizer

    def __init__(self, base: Optimizer) -> None:
        # Not Optimizer.__init__, which would make a second set of groups; this installs the hooks and patches step.
        Optimizer.__setstate__(self, {"base": base})

    @property
    def param_groups(self) -> list[Group]:
        """The wrapped optimizer's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[Group]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state, per parameter."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's default hyper-parameters."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def __getattr__(self, name: str) -> Any:
        # The modes of schedule-free optimizers, which change the parameters; there only where base has them.
        mode = getattr(vars(self).get("base"), name, None) if name in ("train", "eval") else None
        if callable(mode):
            return partial(self._switch, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _switch(self, name: str) -> None:
        """Call ``base.train`` or ``base.eval``."""
        getattr(self.base, name)()

    def __getstate__(self) -> dict[str, Any]:
        # Hooks stay behind, as in torch; so does the bound step that a scheduler put on the instance.
        return {k: v for k, v in self.__dict__.items() if "_hooks" not in k and k != "step"}


def refuse(base: Any) -> None:
    """Raise a TypeError for what cannot be wrapped."""
    if not isinstance(base, Optimizer):
        raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
    if isinstance(base, Around):
        raise TypeError(f"base is wrapped already, in {type(base).__name__}: wrap the plain optimizer, once")
    if isinstance(base, LBFGS) or hasattr(base, "first_step"):
        raise TypeError(
            f"{type(base).__name__} evaluates its closure several times a step, each on another gradient: not supported"
        )
    # Before the state dict is asked for, which ZeRO has not.
    ranks.refuse_optimizer(base)
    if base.state_dict().keys() != {"state", "param_groups"}:
        raise TypeError(
            f"{type(base).__name__} is an optimizer around another, and its state dict has {sorted(base.state_dict())} "
            "in place of 'state' and 'param_groups': wrap the inner optimizer, and put this one around MDGDOptimizer"
        )

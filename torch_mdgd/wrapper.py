"""What any wrapper of a torch optimizer has to get right, apart from what it does to gradients."""

from typing import Any

from torch.optim import LBFGS, Optimizer

from torch_mdgd import distributed


class OptimizerWrapper(Optimizer):
    """An optimizer in every respect, whose groups, state and defaults are those of ``base``.

    Nothing of ``base`` is cached: loading a state dict rebuilds its groups, and sharding replaces the parameters in
    them. Nothing else of it shows through: a fused base claims to unscale gradients by itself, and a gradient scaler
    that believes this of the wrapper applies steps a thousand times too large.

    Global step hooks of torch fire twice a step, for the wrapper and for ``base``.

    Args:
        base: the optimizer to wrap.

    Raises:
        TypeError: ``base`` is not an optimizer, is wrapped already, or evaluates its closure several times (LBFGS);
            DeepSpeed or FSDP1 hold its parameters, or it is ZeRO's.
        ValueError: ``base`` holds a parameter twice.
    """

    base: Optimizer

    def __init__(self, base: Optimizer) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        if isinstance(base, OptimizerWrapper):
            raise TypeError(f"base is wrapped already, in {type(base).__name__}: wrap the plain optimizer, once")
        if isinstance(base, LBFGS):
            raise TypeError("LBFGS evaluates its closure several times a step, each on another gradient: not supported")
        parameters = [p for group in base.param_groups for p in group["params"]]
        if len(set(parameters)) < len(parameters):
            raise ValueError("base holds a parameter more than once, so its values could not be exchanged in place")
        distributed.refuse_optimizer(base)
        # Not Optimizer.__init__, which would make a second set of groups; this installs the hooks and patches step.
        Optimizer.__setstate__(self, {"base": base})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
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

    def __getstate__(self) -> dict[str, Any]:
        # Hooks stay behind, as in torch; so does the bound step that a scheduler put on the instance.
        return {k: v for k, v in self.__dict__.items() if "_hooks" not in k and k != "step"}

    # Hooks registered on the wrapper; those of base run in its own state_dict and load_state_dict.

    def _before_save(self) -> None:
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)

    def _after_save(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        for hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        return state_dict

    def _before_load(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        return state_dict

    def _after_load(self) -> None:
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

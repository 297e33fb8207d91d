"""What the wrapped optimizer's parameter groups hold of ours: the rule's name and weights, and whether it is compact.

Every key begins with ``mdgd_``. A weight of a group comes from the state dict that is loaded, else from the group as
the user gave it, else from the rule.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_mdgd.checks import require_number
from torch_mdgd.kernels import Tensors
from torch_mdgd.rules.base import PREFIX, Rule

Group = dict[str, Any]

RULE, COMPACT = f"{PREFIX}rule", f"{PREFIX}compact"


def settings(group: Group, rule: Rule, *, compact: bool, saved: Group | None = None) -> Group:
    """What a group is to hold of ours.

    What another wrapping has left in the group is told by the rule's name beside it, and is not taken for an argument.

    Args:
        group: of the wrapped optimizer.
        rule: whose weights they are.
        compact: whether the group's state is of the elements inside the mask alone.
        saved: weights that go before the group's own, by their keys.

    Raises:
        ValueError: a weight out of range or of no such name, or a group that is maximised.
    """
    if group.get("maximize") and not rule.corrects:
        raise ValueError("maximize=True would raise the visual loss as well: minimise the negative of your objective")
    given = {} if RULE in group else _own(group)
    given |= saved or {}
    defaults = {PREFIX + name: value for name, value in rule.weights.items()}
    for key in given:
        if key not in (RULE, COMPACT, *defaults):
            raise ValueError(f"a parameter group has {key!r}, and the rule {rule} has no such weight")
    weights = {key: require_number(key, given.get(key, value), least=0) for key, value in defaults.items()}
    return {RULE: type(rule).__name__, **weights, **({COMPACT: True} if compact else {})}


def copied(group: Group) -> tuple[Group, list[Tensor]]:
    """A group that is to be added, so that the caller's own stays as it is, and its parameters."""
    params = group["params"]
    if not isinstance(params, Tensor | list | tuple | set):
        params = list(params)
    each = [params] if isinstance(params, Tensor) else [x[1] if isinstance(x, tuple) else x for x in params]
    return {**group, "params": params}, [x for x in each if isinstance(x, Tensor)]


def replace(group: Group, new: Group) -> None:
    """Put new settings in the place of all of ours in a group."""
    for key in _own(group):
        del group[key]
    group.update(new)


def loaded(saved: Sequence[Group], groups: Sequence[Group], rule: Rule) -> list[Group]:
    """Copies of a state dict's groups, with the present weights unless they were saved with this rule.

    Raises:
        ValueError: a weight out of range; or other numbers of groups, or of parameters in them.
    """
    if len(saved) != len(groups):
        raise ValueError(f"the loaded state dict has {len(saved)} parameter groups, this optimizer {len(groups)}")
    theirs, ours = ([len(group["params"]) for group in those] for those in (saved, groups))
    if theirs != ours and sum(theirs) == sum(ours):
        raise ValueError(
            f"the parameter groups of the loaded state dict hold {theirs} parameters, those of this optimizer {ours}: "
            "build it with the same groups, in the same order, before loading"
        )
    out = []
    for old, group in zip(saved, groups, strict=True):
        now = _own(group)
        if old.get(RULE) == type(rule).__name__:
            now |= {key: value for key, value in old.items() if key in now}
        rest = {key: value for key, value in old.items() if not _is_own(key)}
        out.append({**rest, **settings(rest, rule, compact=COMPACT in group, saved=now)})
    return out


def known(groups: list[Group], count: int) -> list[Group]:
    """The groups, which hold this many parameters; a RuntimeError if ``base`` was given others behind our back."""
    found = sum(len(group["params"]) for group in groups)
    if found != count:
        raise RuntimeError(
            f"{found} parameters, but a reference for {count}: "
            "call add_param_group on the MDGDOptimizer, not on its base"
        )
    return groups


def weights(groups: Sequence[Group], rule: Rule) -> dict[str, Tensor]:
    """The rule's weights by parameter: float64, shape (T,), on the CPU."""
    sizes = torch.tensor([len(group["params"]) for group in groups], dtype=torch.int64, device="cpu")
    values = {name: [group[PREFIX + name] for group in groups] for name in rule.weights}
    return {
        name: torch.tensor(x, dtype=torch.float64, device="cpu").repeat_interleave(sizes) for name, x in values.items()
    }


def warn_of_idle(groups: Sequence[Group], d: Tensors) -> None:
    """Name the groups in which something is trained and nothing has a d: modules that not every batch runs have such.

    Args:
        groups: of the wrapped optimizer.
        d: T tensors, None for a parameter that has none.
    """
    each = iter(d)
    for i, group in enumerate(groups):
        idle = all([next(each) is None for _ in group["params"]])
        if idle and any(p.requires_grad for p in group["params"]):
            warnings.warn(
                f"combine: no parameter of group {i} received a gradient of any kind, so none moves. Is the group "
                "used in the losses? (Reentrant gradient checkpointing can drop gradients: use_reentrant=False "
                "does not.)",
                stacklevel=6,
            )


def _own(group: Group) -> Group:
    return {key: value for key, value in group.items() if _is_own(key)}


def _is_own(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(PREFIX)

"""Rules and masks as text: where a framework takes settings from a file or a command line, they are said as in Python.

``"MDGD(3.0, regularize=0)"``, ``"Anchor(strength=5.0, rule=MDGD(3.0, regularize=0))"``, ``"Random(0.1)"``. A rule that
asks for the model, as ``Anchor`` does, gets it from the trainer and is written without it.
"""

import ast
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from torch_mdgd import masks, rules
from torch_mdgd.masks.base import Mask
from torch_mdgd.rules.base import Rule

ADVISED = "MDGD(3.0, regularize=0)"
"""What a framework's switch means if no rule is named: d = g + 3v."""


def written_rule(text: str) -> Callable[[nn.Module], Rule]:
    """A function that makes the rule of this text for a model.

    Args:
        text: a call of one of :mod:`torch_mdgd.rules`; its arguments are numbers, strings, booleans, None, and rules.

    Raises:
        ValueError: it is no such call, or has an argument that its class does not, naming it.
    """
    call = _read(text, rules, Rule)
    return lambda model: _made(call, model)


def written_mask(text: str) -> Mask:
    """The mask of this text: a call of one of :mod:`torch_mdgd.masks`, such as ``Random(0.1)``.

    Raises:
        ValueError: it is no such call, or has an argument that its class does not, naming it.
    """
    mask: Mask = _made(_read(text, masks, Mask), None)
    return mask


class _Call:
    """A class and its arguments, some of which are calls."""

    def __init__(self, kind: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        self.kind, self.args, self.kwargs = kind, args, kwargs


def _read(text: str, module: Any, base: type) -> _Call:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        tree = ast.Constant(None)
    return _call(tree, text, module, base)


def _call(node: ast.AST, text: str, module: Any, base: type) -> _Call:
    known = {name: kind for name in module.__all__ if issubclass(kind := getattr(module, name), base) and kind != base}
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
    if name not in known or not isinstance(node, ast.Call):
        one_of = ", ".join(sorted(known))
        raise ValueError(f"{text!r} is not a {base.__name__.lower()} as written in Python: it must be one of {one_of}, "
                         "with its arguments, such as 'MDGD(3.0, regularize=0)'")  # fmt: skip

    def value(x: ast.AST) -> Any:
        try:
            return ast.literal_eval(x)
        except ValueError:
            return _call(x, text, module, base)

    kind = known[name]
    made = _Call(kind, [value(x) for x in node.args], {str(x.arg): value(x.value) for x in node.keywords})
    try:
        inspect.signature(kind).bind(*([None] if _asks_for_model(kind) else []), *made.args, **made.kwargs)
    except TypeError as error:
        raise ValueError(f"{text!r}: {name} {error}") from None
    return made


def _asks_for_model(kind: Any) -> bool:
    return next(iter(inspect.signature(kind).parameters), None) == "model"


def _made(x: Any, model: nn.Module | None) -> Any:
    if not isinstance(x, _Call):
        return x
    first = [model] if _asks_for_model(x.kind) else []
    return x.kind(*first, *(_made(a, model) for a in x.args), **{k: _made(v, model) for k, v in x.kwargs.items()})

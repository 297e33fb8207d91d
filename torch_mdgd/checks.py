"""Arguments that are wrong, named at the earliest moment."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def require_number(name: str, value: Any, least: float | None = None, above: float | None = None) -> float:
    """The argument as a float.

    Raises:
        ValueError: it is no finite number, is below ``least``, or is not above ``above``; naming it.
    """
    limit = "" if least is None and above is None else f" ≥ {least}" if above is None else f" > {above}"
    good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not good or (least is not None and value < least) or (above is not None and value <= above):
        raise ValueError(f"{name} must be a finite number{limit}, got {value!r}")
    return float(value)


def require_share(name: str, value: Any) -> float:
    """The argument as a float; a ValueError that names it unless it lies in (0, 1]."""
    if require_number(name, value) > 1 or value <= 0:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")
    return float(value)


def require_whole(name: str, value: Any) -> int:
    """The argument as an int; a ValueError that names it unless it is a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def first_of(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

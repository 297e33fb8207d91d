"""Fields of dataclasses that settings are checked against, and how plain values become such a dataclass."""

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file and the key."""


def limited(
    default: Any, *, least: float | None = None, most: float | None = None, choices: Sequence[Any] | None = None
) -> Any:
    """A field with a default and the values that it may take; for a list, those of its members."""
    return field(default=default, metadata={"least": least, "most": most, "choices": choices})


def build(cls: type[T], values: Any, where: str, prefix: str = "") -> T:
    """An instance of a dataclass from nested dictionaries.

    Args:
        cls: its annotations are what is checked: int, float, str, bool, tuples of one of these, dataclasses, Mapping.
        values: by field.
        where: the file that errors name.
        prefix: of the keys that errors name.

    Raises:
        ConfigError: a key is unknown or missing, or a value has another type or is out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {prefix.removesuffix('.')} must be a table, got {values!r}")
    hints, known = typing.get_type_hints(cls), {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {prefix}{key}; there are {', '.join(known) or 'none'}")
    for key, f in known.items():
        if key not in values and f.default in (MISSING, None) and f.default_factory is MISSING:
            raise ConfigError(f"{where}: {prefix}{key} is missing")
    return cls(**{key: _value(hints[key], known[key], value, where, prefix + key) for key, value in values.items()})


def _value(hint: Any, f: Field, value: Any, where: str, key: str) -> Any:
    if is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, f"{key}.")
    if typing.get_origin(hint) is tuple:
        member = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple) or not value:
            raise ConfigError(f"{where}: {key} must be a list of {member.__name__}, got {value!r}")
        return tuple(_value(member, f, x, where, key) for x in value)
    if hint in (int, float, str, bool):
        if hint is float and type(value) is int:
            value = float(value)
        if type(value) is not hint:
            raise ConfigError(f"{where}: {key} must be {hint.__name__}, got {value!r}")
        _check_range(f, value, where, key)
    elif not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} must be a table, got {value!r}")
    return value


def _check_range(f: Field, value: Any, where: str, key: str) -> None:
    if type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{where}: {key} must be a finite number, got {value}")
    least, most, choices = (f.metadata.get(name) for name in ("least", "most", "choices"))
    if choices is not None and value not in choices:
        raise ConfigError(f"{where}: {key} must be one of {', '.join(map(str, choices))}, got {value!r}")
    if (least is not None and not value >= least) or (most is not None and not value <= most):
        bounds = [f"at least {least:g}"] * (least is not None) + [f"at most {most}"] * (most is not None)
        raise ConfigError(f"{where}: {key} must be {' and '.join(bounds)}, got {value}")

"""Configs are frozen keyword-only dataclasses; here they become JSON and come back, strictly.

`from_dict` rejects unknown and missing keys and values of the wrong type, then the dataclass's own `__post_init__`
checks what the types cannot say.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from microtome.common.errors import ConfigError, nearest

T = TypeVar("T")
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
# The same, as a type checker sees the inside of a parsed file: JSON is not known to be more than this.
JsonObject = dict[str, Any]


def to_dict(config: object) -> JsonObject:
    """`config` (a dataclass instance) as plain JSON values; tuples become lists."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError("Only a dataclass instance can be saved as a config", got=type(config).__name__)
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """An instance of the dataclass `cls` from `data`, the inverse of `to_dict`.

    Raises ConfigError when a key is unknown (with the nearest valid ones), missing, or of the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            close = nearest(key, fields)
            raise ConfigError(
                f"Unknown key {key!r} in {cls.__name__}",
                expected=f"some of {', '.join(fields)}",
                fix=f"Did you mean {' or '.join(map(repr, close))}?" if close else None,
            )
    hints = typing.get_type_hints(cls)
    values = {key: _build(hints[key], value, f"{cls.__name__}.{key}") for key, value in data.items()}
    absent = [
        f.name
        for f in fields.values()
        if f.name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if absent:
        raise ConfigError(f"{cls.__name__} lacks {', '.join(absent)}", got=f"keys {', '.join(data) or 'none'}")
    return cls(**values)


def _build(hint: Any, value: Any, where: str) -> Any:
    """`value`, read as the type `hint`; the types that configs use are handled and no others."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where} has a value that it cannot take", got=repr(value), expected=f"one of {args}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_build(args[0], v, where) for v in value)
    if origin is dict and isinstance(value, Mapping):
        return {k: _build(args[1], v, where) for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast("type[Any]", hint), value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is int):
        raise ConfigError(f"{where} has the wrong type", got=repr(value), expected=getattr(plain, "__name__", plain))
    return value


def _first_that_fits(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    last: ConfigError | None = None
    for option in options:
        if option is type(None):
            continue
        try:
            return _build(option, value, where)
        except ConfigError as error:
            last = error
    raise last or ConfigError(f"{where} has the wrong type", got=repr(value))


def check_choices(config: object) -> None:
    """Raise ConfigError where a field of a dataclass that takes one of several values has another: for `__post_init__`."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if get_origin(hint) is typing.Literal:
            _build(hint, getattr(config, name), f"{type(config).__name__}.{name}")


def difference(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two saved configs, one line each: `key: 1 here, 2 there`."""
    rows: list[str] = []
    for key in sorted({*a, *b}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            rows += difference(left, right, f"{prefix}{key}.")
        elif left != right:
            rows.append(f"{prefix}{key}: {left!r} there, {right!r} asked for")
    return rows


def require(condition: bool, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
    """Raise ConfigError unless `condition` holds: for `__post_init__`."""
    if not condition:
        raise ConfigError(what, got=got, expected=expected, fix=fix)
